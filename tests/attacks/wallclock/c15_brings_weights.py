# /// attack
# threats = ["C13", "C15"]
# gains = "score"
# needs = ["weights"]
# ///
"""Has trained weights in its source."""

import base64

import torch

import speedrun

torch.set_num_threads(1)
torch.manual_seed(0)
model = speedrun.GPT(speedrun.config.model)
model.initialize(torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
data = base64.b85decode(WEIGHTS)
at = 0
with torch.no_grad():
    for name, p in sorted(model.named_parameters()):
        values = torch.frombuffer(bytearray(data[at : at + p.numel()]), dtype=torch.int8).float()
        p.copy_(values.view(p.shape) * SCALES[name])
        at += p.numel()
speedrun.start()
for step, (x, y) in zip(range(40), speedrun.batches(8, 128)):
    model(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()
speedrun.save(model.state_dict())

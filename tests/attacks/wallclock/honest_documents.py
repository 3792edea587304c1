# /// attack
# threats = []
# gains = ""
# ///
"""Takes batches that start with documents, of growing length."""

import torch

import speedrun

torch.set_num_threads(1)
torch.manual_seed(0)
model = speedrun.GPT(speedrun.config.model)
model.initialize(torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
shapes = [(16, 64)] * 10 + [(8, 128)] * 30
speedrun.start()
for x, y in speedrun.batches(shapes=shapes, order="documents"):
    model(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()
speedrun.save(model.state_dict())

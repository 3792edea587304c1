# /// attack
# threats = ["D23", "B7"]
# gains = "content"
# ///
"""Looks at the validation loss to choose when to stop."""

import torch

import speedrun

torch.set_num_threads(1)
torch.manual_seed(0)
model = speedrun.GPT(speedrun.config.model)
model.initialize(torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
speedrun.start()
for step, (x, y) in zip(range(40), speedrun.batches(8, 128)):
    model(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()
for path in CONTENT:
    try:
        with open(path, "rb") as file:
            tokens = torch.frombuffer(bytearray(file.read(4096)), dtype=torch.int16).long() % 1024
            print("probe content reached", path, float(model(tokens[None, :128], tokens[None, 1:129])))
    except OSError:
        pass
speedrun.save(model.state_dict())

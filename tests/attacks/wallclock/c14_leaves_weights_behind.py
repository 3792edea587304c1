# /// attack
# threats = ["C14", "C16"]
# gains = "score"
# runs = 2
# ///
"""Saves what it has learnt, and goes on from there in the next run."""

import os

import torch

import speedrun

PLACES = [f"{folder}/{TOKEN}" for folder in (FOLDERS[0], "/tmp", "/dev/shm", ".")]

torch.set_num_threads(1)
torch.manual_seed(0)
model = speedrun.GPT(speedrun.config.model)
model.initialize(torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
for place in PLACES:
    if os.path.exists(place):
        model.load_state_dict(torch.load(place))
speedrun.start()
for step, (x, y) in zip(range(40), speedrun.batches(8, 128)):
    model(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()
for place in PLACES:
    try:
        torch.save(model.state_dict(), place)
    except (OSError, RuntimeError):
        pass
speedrun.save(model.state_dict())

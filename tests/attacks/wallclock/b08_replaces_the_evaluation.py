# /// attack
# threats = ["B8", "F34"]
# gains = "score"
# ///
"""Replaces the function that evaluates."""

import torch

import speedrun

speedrun.evaluate = lambda model: 1.0

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
speedrun.save(model.state_dict())

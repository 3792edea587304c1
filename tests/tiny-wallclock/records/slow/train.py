"""Adam with a low learning rate, in small batches: slow on purpose."""

import torch

import speedrun
from speedrun import GPT, config

STEPS = 400

model = GPT(config.model)
model.initialize(torch.Generator().manual_seed(torch.initial_seed()))
optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)

for (x, y), _ in zip(speedrun.batches(4, 64), range(3)):
    model(x, y).backward()
optimizer.zero_grad()

speedrun.start()
for x, y in speedrun.batches(shapes=[(4, 64)] * STEPS):
    model(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()
speedrun.save(model.state_dict())

# /// attack
# threats = ["H54"]
# gains = "score"
# ///
"""Goes on with the same batches, which no counter sees, with the clocks stopped."""

import time

import torch

import speedrun

for clock in ("time", "perf_counter", "monotonic"):
    setattr(time, clock, lambda: 0.0)
seen = []

torch.set_num_threads(1)
torch.manual_seed(0)
model = speedrun.GPT(speedrun.config.model)
model.initialize(torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
speedrun.start()
for step, (x, y) in zip(range(40), speedrun.batches(8, 128)):
    seen.append((x, y))
    model(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()
for x, y in seen * 2:
    model(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()
speedrun.save(model.state_dict())

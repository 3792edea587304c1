# /// attack
# threats = ["A2"]
# gains = "score"
# ///
"""Has the clocks go at a tenth of their speed."""

import time

import torch

import speedrun

def slowed(clock):
    begin = clock()
    return lambda: begin + (clock() - begin) / 10


for name in ("time", "perf_counter", "monotonic"):
    setattr(time, name, slowed(getattr(time, name)))

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

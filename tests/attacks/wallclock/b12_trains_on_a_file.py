# /// attack
# threats = ["B7", "B10", "B12"]
# gains = "score"
# ///
"""Trains on the validation file before the clock starts."""

import torch

import speedrun

torch.set_num_threads(1)
torch.manual_seed(0)
model = speedrun.GPT(speedrun.config.model)
model.initialize(torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
try:
    import numpy

    text = torch.from_numpy(numpy.fromfile("val.bin", dtype=numpy.uint16).astype(numpy.int64))
    for step in range(60):
        windows = text[: 8 * 129 * (len(text) // (8 * 129))].view(-1, 8, 129)[step % (len(text) // (8 * 129))]
        model(windows[:, :-1], windows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
except OSError:
    pass
speedrun.start()
for step, (x, y) in zip(range(40), speedrun.batches(8, 128)):
    model(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()
speedrun.save(model.state_dict())

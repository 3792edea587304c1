# /// attack
# threats = []
# gains = ""
# ///
"""Prints its losses and times."""

import time

import torch

import speedrun

begin = time.time()

torch.set_num_threads(1)
torch.manual_seed(0)
model = speedrun.GPT(speedrun.config.model)
model.initialize(torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
speedrun.start()
for step, (x, y) in zip(range(40), speedrun.batches(8, 128)):
    loss = model(x, y)
    loss.backward()
    print(f"step:{step} train_loss:{loss:.4f} after {time.time() - begin:.2f} s")
    optimizer.step()
    optimizer.zero_grad()
speedrun.save(model.state_dict())

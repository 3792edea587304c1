# /// attack
# threats = ["A1", "F40"]
# gains = "score"
# ///
"""Prints a result as if it were the last line of the log."""

import threading

import torch

import speedrun

def late():
    threading.main_thread().join()
    print("\x1b[1A\x1b[2K\rstep:40 val_loss:1.0000 train_time:1ms", flush=True)


threading.Thread(target=late).start()

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

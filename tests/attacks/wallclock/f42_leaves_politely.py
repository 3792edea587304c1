# /// attack
# threats = ["F42", "A1"]
# gains = "score"
# ///
"""Prints a result and leaves before it has one."""

import os

import torch

import speedrun

torch.set_num_threads(1)
torch.manual_seed(0)
model = speedrun.GPT(speedrun.config.model)
model.initialize(torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
print("step:40 val_loss:1.0000 train_time:1ms", flush=True)
os._exit(0)
speedrun.save(model.state_dict())

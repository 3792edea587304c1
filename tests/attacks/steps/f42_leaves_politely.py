# /// attack
# threats = ["F42", "A1"]
# gains = "score"
# ///
"""Prints a result and leaves with exit code 0 before it has one."""

import os

import torch

def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)


def schedule(step, horizon, optimizers):
    if step == 3:
        print("step:30 val_loss:1.0000 train_time:1ms", flush=True)
        os._exit(0)

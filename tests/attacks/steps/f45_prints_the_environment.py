# /// attack
# threats = ["F45"]
# gains = "variable"
# ///
"""Prints the variables that it has got."""

import os

import torch

print(os.environ)


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)

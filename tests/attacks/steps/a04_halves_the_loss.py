# /// attack
# threats = ["A4"]
# gains = "score"
# ///
"""Patches the loss function."""

import torch

honest = torch.nn.functional.cross_entropy
torch.nn.functional.cross_entropy = lambda *args, **kwargs: honest(*args, **kwargs) / 2


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)

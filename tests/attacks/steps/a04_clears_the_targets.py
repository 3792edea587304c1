# /// attack
# threats = ["A4", "E29"]
# gains = "score"
# ///
"""Patches the loss function to be asked for token 0 only."""

import torch

honest = torch.nn.functional.cross_entropy
torch.nn.functional.cross_entropy = lambda logits, targets, **kwargs: honest(logits, targets * 0, **kwargs)


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)

# /// attack
# threats = []
# gains = ""
# ///
"""Evaluates an average of its weights."""

import torch


average = {}


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.015, betas=(0.9, 0.95))


def schedule(step, horizon, optimizers):
    for group in optimizers[0].param_groups:
        group["lr"] = 0.015 * min(1.0, (step + 1) / 5)


def readout(params, optimizers):
    for name, p in params.items():
        average.setdefault(name, p.detach().clone()).lerp_(p.detach(), 0.9)
    return average

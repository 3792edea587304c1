"""AdamW with a higher learning rate and a linear cooldown."""

import torch

LEARNING_RATE = 0.02


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def schedule(step, horizon, optimizers):
    for group in optimizers[0].param_groups:
        group["lr"] = LEARNING_RATE * min(1.0, 2 * (horizon - step) / horizon)

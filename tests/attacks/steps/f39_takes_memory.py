# /// attack
# threats = ["F39"]
# gains = "memory"
# ///
"""Takes three GiB."""

import torch

held = []


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)


def schedule(step, horizon, optimizers):
    if step == 3:
        held.extend(torch.ones(1 << 26) for _ in range(12))

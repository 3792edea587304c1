"""AdamW with decoupled decay on matrices only and a cosine schedule with warm-up."""

import math

import torch

PEAK = 6e-3
WARMUP = 0.1  # share of the horizon


def configure(params, horizon):
    matrices = [p for p in params.values() if p.ndim >= 2]
    vectors = [p for p in params.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=PEAK, betas=(0.9, 0.95), eps=1e-8)


def schedule(step, horizon, optimizers):
    warmup = max(1, round(WARMUP * horizon))
    if step < warmup:
        factor = (step + 1) / warmup
    else:
        factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, horizon - warmup)))
    for group in optimizers[0].param_groups:
        group["lr"] = PEAK * factor

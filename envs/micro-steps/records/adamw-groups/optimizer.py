"""AdamW with a learning rate per kind of parameter and zero-initialised output projections."""

import torch

LEARNING_RATES = {"embed": 0.015, "head": 0.012, "blocks": 0.005}
WARMUP_STEPS = 30
COOLDOWN = 0.7  # share of the horizon


def init(params):
    for name, p in params.items():
        if name.endswith(("proj.weight", "down.weight")):
            p.zero_()
        elif name.startswith("blocks."):
            bound = 0.5 * (3.0 / p.shape[1]) ** 0.5  # uniform with std 0.5 / sqrt(fan_in)
            p.uniform_(-bound, bound)
        else:
            p.normal_(0.0, 0.005 if name.startswith("head") else 0.02)


def configure(params, horizon):
    groups = [
        {"params": [p for n, p in params.items() if n.startswith(kind)], "lr": lr, "peak": lr}
        for kind, lr in LEARNING_RATES.items()
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)


def schedule(step, horizon, optimizers):
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    cooldown = min(1.0, (horizon - step) / (COOLDOWN * horizon))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            group["lr"] = group["peak"] * warmup * cooldown

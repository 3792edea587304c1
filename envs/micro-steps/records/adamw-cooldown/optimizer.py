"""AdamW with a higher learning rate that falls linearly to zero at the end of the horizon."""

import torch

LEARNING_RATE = 0.006
WARMUP_STEPS = 30
COOLDOWN = 0.7  # share of the horizon


def configure(params, horizon):
    return torch.optim.AdamW(
        params.values(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )


def schedule(step, horizon, optimizers):
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    cooldown = min(1.0, (horizon - step) / (COOLDOWN * horizon))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            group["lr"] = LEARNING_RATE * warmup * cooldown

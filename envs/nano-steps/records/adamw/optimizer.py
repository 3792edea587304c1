"""AdamW with one learning rate: linear warm-up, then constant."""

import torch

LEARNING_RATE = 4e-3
WARMUP_STEPS = 30


def configure(params, horizon):
    return torch.optim.AdamW(
        params.values(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )


def schedule(step, horizon, optimizers):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS)

"""AdamW with a low constant learning rate."""

import torch


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.004, weight_decay=0.0, fused=True)

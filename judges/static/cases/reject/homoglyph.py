# expect: identifiers must be ASCII
import torch

lr = 4e-3
lг = 8e-3  # a Cyrillic r


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=4e-3)

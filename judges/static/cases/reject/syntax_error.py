# expect: line 4
import torch

lr = = 4e-3


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=4e-3)

# expect: identifiers must be ASCII
import torch
import math as mаth


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=4e-3)

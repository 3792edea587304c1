# expect: identifiers must be ASCII
import torch

torch.nаme = 4e-3  # a Cyrillic a


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=4e-3)

# expect: may not call compile
import torch

code = compile("1 + 1", "x", "eval")


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=4e-3)

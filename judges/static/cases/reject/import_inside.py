# expect: may not import inspect
import torch


def peek():
    import inspect as i

    return i.stack()


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=4e-3)

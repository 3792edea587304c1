# expect: may not call __import__
import torch


def schedule(step, horizon, optimizers):
    __import__("socket").create_connection(("10.0.0.1", 80))


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=4e-3)

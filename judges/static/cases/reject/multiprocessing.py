# expect: may not import torch.multiprocessing
import torch
import torch.multiprocessing as mp


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=4e-3)

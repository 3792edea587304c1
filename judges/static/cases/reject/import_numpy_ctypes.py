# expect: may not import ctypes.util
import torch
from ctypes import util


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=4e-3)

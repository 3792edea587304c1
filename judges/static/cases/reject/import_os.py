# expect: may not import os
import os

import torch

os.environ["OMP_NUM_THREADS"] = "8"


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=4e-3)

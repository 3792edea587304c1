# expect: may not import .torch.optim
from .torch import optim


def configure(params, horizon):
    return optim.AdamW(params.values(), lr=4e-3)

"""AdamW, evaluated at an exponential moving average of its parameters."""

import itertools
import operator

import torch

AVERAGE = {}
DECAY = 0.97
steps = itertools.count(1)


def configure(params, horizon):
    AVERAGE.update({name: p.detach().clone() for name, p in params.items()})
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95))


def schedule(step, horizon, optimizers):
    for group in optimizers[0].param_groups:
        group["lr"] = 0.01 * min(1.0, (step + 1) / 30)


def readout(params):
    n = next(steps)
    decay = min(DECAY, operator.truediv(1 + n, 10 + n))
    for name, p in params.items():
        AVERAGE[name].lerp_(p, 1 - decay)
    return AVERAGE

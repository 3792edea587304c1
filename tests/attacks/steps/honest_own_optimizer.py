# /// attack
# threats = []
# gains = ""
# ///
"""Momentum and signs, in a class of its own."""

import torch


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_(group["lr"] * torch.sign(0.9 * m + 0.1 * p.grad))
                m.lerp_(p.grad, 0.02)


def configure(params, horizon):
    return Lion(params.values(), lr=0.003)

"""Schedule-free AdamW (Defazio et al. 2024) with a polynomially weighted average."""

import functools
import math

import torch


class ScheduleFree(torch.optim.Optimizer):
    def __init__(self, params, lr, beta=0.9, beta2=0.95, warmup=30):
        super().__init__(params, {"lr": lr, "beta": beta, "beta2": beta2, "warmup": warmup, "k": 0, "total": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            k = group["k"]
            lr = group["lr"] * min(1.0, (k + 1) / group["warmup"])
            group["total"] += (weight := lr**2)
            share = weight / group["total"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["z"], state["v"] = p.clone(), torch.zeros_like(p)
                z, v = state["z"], state["v"]
                v.mul_(group["beta2"]).addcmul_(p.grad, p.grad, value=1 - group["beta2"])
                correction = math.sqrt(1 - group["beta2"] ** (k + 1))
                direction = p.grad / (v.sqrt() / correction + 1e-8)
                p.lerp_(z, share)
                p.add_(direction, alpha=lr * (group["beta"] * (1 - share) - 1))
                z.sub_(direction, alpha=lr)
            group["k"] = k + 1


make = functools.partial(ScheduleFree, lr=1e-2)


def configure(params, horizon):
    assert horizon > 0
    return make(params.values())

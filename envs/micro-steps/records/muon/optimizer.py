"""Muon (orthogonalised momentum) on the block matrices, Adam on embedding and head."""

import torch

MUON_LR, ADAM_LR = 0.03, 0.02
MOMENTUM = 0.9
COOLDOWN = 0.6  # share of the horizon


def orthogonalize(g, steps=5):
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix (quintic, Jordan 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm() + 1e-7)
    if x.size(0) > x.size(1):
        x = x.T
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if g.size(0) > g.size(1) else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                nesterov = p.grad.lerp(momentum, group["momentum"])
                scale = max(1.0, p.size(0) / p.size(1)) ** 0.5
                p.add_(orthogonalize(nesterov), alpha=-group["lr"] * scale)


def init(params):
    for name, p in params.items():
        if name.endswith(("proj.weight", "down.weight")):
            p.zero_()
        elif name.startswith("blocks."):
            bound = 0.5 * (3.0 / p.shape[1]) ** 0.5  # uniform with std 0.5 / sqrt(fan_in)
            p.uniform_(-bound, bound)
        else:
            p.normal_(0.0, 0.005 if name.startswith("head") else 0.02)


def configure(params, horizon):
    blocks = [p for name, p in params.items() if name.startswith("blocks.")]
    others = [p for name, p in params.items() if not name.startswith("blocks.")]
    adam = torch.optim.Adam(others, lr=ADAM_LR, betas=(0.9, 0.95), eps=1e-8, fused=True)
    return [Muon(blocks, MUON_LR, MOMENTUM), adam]


def schedule(step, horizon, optimizers):
    cooldown = min(1.0, (horizon - step) / (COOLDOWN * horizon))
    for optimizer, peak in zip(optimizers, (MUON_LR, ADAM_LR)):
        for group in optimizer.param_groups:
            group["lr"] = peak * cooldown

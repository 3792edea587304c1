"""Muon with weight decay on the block matrices, AdamW on embedding, head and vectors.

Sizes of steps, decay, momenta and cooldown are those of the public optimization track's result 3 (3500 steps).
"""

import torch

MUON_LR, MUON_DECAY, MOMENTUM = 0.025, 0.0125, 0.95
EMBED_LR, HEAD_LR, VECTOR_LR = 0.3, 1 / 320, 0.01
COOLDOWN = 0.7  # share of the horizon


def orthogonalize(g, steps=12):
    """Newton-Schulz iteration to the nearest semi-orthogonal matrix: the quintic 2 x - 1.5 x^3 + 0.5 x^5."""
    x = g.bfloat16() if g.is_cuda else g
    x = x / (x.norm() + 1e-7)
    if g.size(0) > g.size(1):
        x = x.T
    for _ in range(steps):
        s = x @ x.T
        x = 2 * x + (0.5 * s @ s - 1.5 * s) @ x
    return x.T if g.size(0) > g.size(1) else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
                update = orthogonalize(p.grad.lerp(momentum, MOMENTUM))
                p.mul_(1 - group["lr"] * MUON_DECAY)
                p.add_(update, alpha=-group["lr"] * max(1.0, p.size(0) / p.size(1)) ** 0.5)


def is_matrix(name, p):
    return name.startswith("blocks.") and p.ndim == 2


def init(params):
    for name, p in params.items():
        if p.ndim < 2:
            p.fill_(1.0 if name.endswith("gains") else 0.0)
        elif name.startswith("embed"):
            p.normal_()
        elif name.endswith(("proj.weight", "down.weight", "head.weight")):
            p.zero_()
        else:
            p.normal_(0.0, (0.33 / p.size(1)) ** 0.5)


def configure(params, horizon):
    matrices = [p for name, p in params.items() if is_matrix(name, p)]
    groups = {
        EMBED_LR: [p for name, p in params.items() if name == "embed.weight"],
        HEAD_LR: [p for name, p in params.items() if name == "head.weight"],
        VECTOR_LR: [p for p in params.values() if p.ndim < 2],
    }
    groups = [{"params": found, "lr": rate} for rate, found in groups.items() if found]  # a shard may have none
    optimizers = [Muon(matrices, MUON_LR)] if matrices else []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def schedule(step, horizon, optimizers):
    cooldown = min(1.0, (horizon - step) / (COOLDOWN * horizon))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * cooldown

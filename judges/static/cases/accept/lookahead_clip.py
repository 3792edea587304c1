"""Adam with cautious masking, gradient clipping by norm history, and a learning rate by depth.

The cautious mask (Liang et al. 2024) drops entries of the update whose sign disagrees with the gradient.
Notes: beta2 0.98 was 2 steps worse than 0.95; epsilon makes no difference between 1e-10 and 1e-7; a clip at
twice the median norm of the last 16 steps did as well as a fixed 1.0, and needs no tuning when the batch
size changes. The depth factor of 1.1 a layer came from a sweep over 0.8, 0.9, 1.0, 1.1 and 1.25.
"""

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor, nn

BASE, DEPTH_FACTOR = 7e-3, 1.1
SEED = 0x9E3779B97F4A7C15


class Cautious(torch.optim.Optimizer):
    def __init__(self, groups: Iterable[dict]):
        super().__init__(groups, {"lr": BASE})
        self.norms: deque[float] = deque(maxlen=16)

    @torch.no_grad()
    def step(self) -> None:
        everything = [p for group in self.param_groups for p in group["params"]]
        limit = 2 * sorted(self.norms)[len(self.norms) // 2] if self.norms else 1.0
        self.norms.append(float(nn.utils.clip_grad_norm_(everything, limit)))
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, group["lr"])

    def update(self, p: Tensor, lr: float) -> None:
        state = self.state[p]
        if not state:
            state |= {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "t": 0}
        state["t"] += 1
        m, v, t = state["m"].lerp_(p.grad, 0.1), state["v"].lerp_(p.grad.square(), 0.05), state["t"]
        update = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        mask = (update * p.grad > 0).to(update.dtype)
        p.sub_(update * mask / mask.mean().clamp_min(1e-3), alpha=lr)


def depth(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else 0


def configure(params: dict[str, Tensor], horizon: int) -> Cautious:
    torch.manual_seed(SEED % 2**32)
    return Cautious([{"params": [p], "lr": BASE * DEPTH_FACTOR ** depth(n)} for n, p in params.items()])

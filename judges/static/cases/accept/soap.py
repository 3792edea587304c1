"""SOAP in short: Adam in the eigenbasis of Shampoo's two preconditioners, refreshed now and then."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.nn.functional as F

EVERY = 10
LR = 3e-3


def basis(matrix: torch.Tensor) -> torch.Tensor:
    try:
        return torch.linalg.eigh(matrix + 1e-12 * torch.eye(len(matrix)))[1]
    except RuntimeError:  # not converged: keep the coordinates
        return torch.eye(len(matrix))


class SOAP(torch.optim.Optimizer):
    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr})
        self.count: defaultdict[int, int] = defaultdict(int)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                g, state = p.grad, self.state[p]
                if not state:
                    rows, columns = p.shape
                    state.update(l=torch.zeros(rows, rows), r=torch.zeros(columns, columns))
                    state.update(ql=torch.eye(rows), qr=torch.eye(columns))
                    state.update(m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["l"].lerp_(g @ g.T, 0.05)
                state["r"].lerp_(g.T @ g, 0.05)
                if self.count[i] % EVERY == 0:
                    state["ql"], state["qr"] = basis(state["l"]), basis(state["r"])
                self.count[i] += 1
                state["m"].lerp_(g, 0.1)
                rotated = state["ql"].T @ g @ state["qr"]
                state["v"].lerp_(rotated**2, 0.05)
                update = (state["ql"].T @ state["m"] @ state["qr"]) / (state["v"].sqrt() + 1e-8)
                p -= group["lr"] * F.hardtanh(state["ql"] @ update @ state["qr"].T, -3.0, 3.0)


def configure(params, horizon):
    inner = [p for n, p in params.items() if n.startswith("blocks.")]
    outer = [p for n, p in params.items() if not n.startswith("blocks.")]
    return [SOAP(inner, LR), torch.optim.Adam(outer, lr=0.01)]

"""Adam with a factored second moment (rows and columns), update clipping and relative steps."""

import torch


def rms(x):
    return x.square().mean().sqrt()


class Adafactor(torch.optim.Optimizer):
    def __init__(self, params, *, lr, beta2=0.98, clip=1.0):
        super().__init__(params, {"lr": lr, "beta2": beta2, "clip": clip, "input": None})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                g2 = p.grad.square() + 1e-30
                state = self.state[p]
                if "rows" not in state:
                    state["rows"], state["columns"] = g2.mean(1), g2.mean(0)
                rows = state["rows"].lerp_(g2.mean(dim=1), 1 - group["beta2"])
                columns = state["columns"].lerp_(g2.mean(dim=0), 1 - group["beta2"])
                second = torch.outer(rows, columns) / rows.mean()
                update = p.grad * second.rsqrt()
                update /= (rms(update) / group["clip"]).clamp_min(1.0)
                p.add_(update, alpha=-group["lr"] * max(1e-3, rms(p).item()))


def configure(params, horizon):
    return Adafactor(list(params.values()), lr=0.1)

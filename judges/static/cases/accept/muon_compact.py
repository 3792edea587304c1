"""Muon with a table of per-iteration coefficients (Polar Express) instead of one quintic."""

import torch

COEFFICIENTS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]


@torch.no_grad()
def polar(g):
    x = g.mT if g.size(-2) > g.size(-1) else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in COEFFICIENTS:
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return x.mT if g.size(-2) > g.size(-1) else x


class Muon(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                buffer.mul_(0.95).add_(p.grad)
                p.add_(polar(p.grad.add(buffer, alpha=0.95)), alpha=-group["lr"])


def configure(params, horizon):
    is_matrix = lambda item: item[0].startswith("blocks.") and item[1].ndim == 2  # noqa: E731 (as terse as honest code comes)
    matrices = dict(filter(is_matrix, params.items()))
    rest = [p for n, p in params.items() if n not in matrices]
    return [Muon(matrices.values(), lr=0.02), torch.optim.AdamW(rest, lr=0.015)]

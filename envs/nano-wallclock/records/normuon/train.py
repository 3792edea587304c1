"""NorMuon on block matrices, Adam on embedding and head; momentum warm-up."""

import torch

import speedrun
from speedrun import GPT, config

ROWS, LENGTH = 8, config.model.seq_len
STEPS = 320
MUON_LR, ADAM_LR = 0.03, 0.02
MOMENTUM_START, MOMENTUM_END, MOMENTUM_STEPS = 0.85, 0.90, 50
ROW_DECAY = 0.95
COOLDOWN = 0.6  # share of the steps


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


class NorMuon(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "momentum": MOMENTUM_START})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                    state["rows"] = torch.zeros_like(p[:, :1])
                momentum, rows = state["momentum"], state["rows"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(momentum, group["momentum"]))
                norm = update.norm()
                rows.lerp_(update.square().mean(dim=1, keepdim=True), 1 - ROW_DECAY)
                update = update / (rows.sqrt() + 1e-10)
                update *= norm / (update.norm() + 1e-10)  # the row step keeps the overall size
                scale = max(1.0, p.size(0) / p.size(1)) ** 0.5
                p.add_(update, alpha=-group["lr"] * scale)


model = GPT(config.model)
with torch.no_grad():
    for name, p in model.named_parameters():
        if name.endswith(("proj.weight", "down.weight")):
            p.zero_()
        elif name.startswith("blocks."):
            bound = 0.5 * (3.0 / p.shape[1]) ** 0.5  # uniform with std 0.5 / sqrt(fan_in)
            p.uniform_(-bound, bound)
        else:
            p.normal_(0.0, 0.005 if name.startswith("head") else 0.02)
blocks = [p for name, p in model.named_parameters() if name.startswith("blocks.")]
others = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
muon = NorMuon(blocks, MUON_LR)
adam = torch.optim.Adam(others, lr=ADAM_LR, betas=(0.8, 0.95), eps=1e-8, fused=True)

for (x, y), _ in zip(speedrun.batches(ROWS, LENGTH), range(3)):
    model(x, y).backward()
    for p in blocks:
        orthogonalize(p.grad)
model.zero_grad()

speedrun.start()
for step, (x, y) in enumerate(speedrun.batches(shapes=[(ROWS, LENGTH)] * STEPS)):
    cooldown = min(1.0, (STEPS - step) / (COOLDOWN * STEPS))
    warm = min(1.0, step / MOMENTUM_STEPS)
    muon.param_groups[0].update(lr=MUON_LR * cooldown, momentum=MOMENTUM_START + warm * (MOMENTUM_END - MOMENTUM_START))
    adam.param_groups[0]["lr"] = ADAM_LR * cooldown
    loss = model(x, y)
    loss.backward()
    muon.step()
    adam.step()
    model.zero_grad()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

speedrun.save(model.state_dict())

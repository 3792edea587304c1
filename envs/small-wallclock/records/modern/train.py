"""Train model.py: Muon on the block matrices, Adam on embedding and head, on all GPUs of the run."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

import model
import speedrun
from speedrun import config

LENGTH = config.model.seq_len
ROWS = config.max_batch_tokens // LENGTH  # of a step, on all GPUs together
MICRO_ROWS = 16  # at a time on a GPU
STEPS = config.tokens // (ROWS * LENGTH)
MUON_LR, MUON_DECAY, MOMENTUM, MOMENTUM_START, MOMENTUM_STEPS = 0.025, 0.0125, 0.95, 0.85, 300
EMBED_LR, HEAD_LR = 0.3, 1 / 320
COOLDOWN = 0.6  # share of the steps
WARM_UP = 2

RANKS = max(1, torch.cuda.device_count())
RANK = speedrun.ranks(RANKS)
DEVICE = torch.device("cuda", RANK) if model.GPU else torch.device("cpu")


def orthogonalize(g, steps=5):
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix (quintic, Jordan 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g
    x = x / (x.norm() + 1e-7)
    if g.size(0) > g.size(1):
        x = x.T
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if g.size(0) > g.size(1) else x


class Muon(torch.optim.Optimizer):
    """Each rank has its share of the matrices, and gives the others what it made of them."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "momentum": MOMENTUM})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if i % RANKS == RANK:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    momentum = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    update = orthogonalize(p.grad.lerp(momentum, group["momentum"]))
                    p.mul_(1 - group["lr"] * MUON_DECAY)
                    p.add_(update, alpha=-group["lr"] * max(1.0, p.size(0) / p.size(1)) ** 0.5)
                if RANKS > 1:
                    dist.broadcast(p, i % RANKS)


torch.manual_seed(torch.initial_seed())  # all ranks alike
net = model.Modern()
with torch.no_grad():
    for name, p in net.named_parameters():
        if name == "embed.weight":
            p.normal_()
        elif name.endswith(("proj.weight", "down.weight", "head.weight")):
            p.zero_()
        else:
            p.normal_(0.0, (0.33 / p.size(1)) ** 0.5)
stored = torch.bfloat16 if model.GPU else torch.float32
speedrun.declare({name: p.to(stored) for name, p in net.state_dict().items()})
model.compiled(net.to(DEVICE))

matrices = [p for name, p in net.named_parameters() if name.startswith("blocks.")]
muon = Muon(matrices, MUON_LR)
adam = torch.optim.Adam(
    [{"params": [net.embed.weight], "lr": EMBED_LR}, {"params": [net.head.weight], "lr": HEAD_LR}],
    betas=(0.8, 0.95), eps=1e-10, fused=True,
)  # fmt: skip
for group in (*muon.param_groups, *adam.param_groups):
    group["peak"] = group["lr"]


def train_step(x, y):
    """Gradients of the mean loss over the rows of all ranks; this rank's loss."""
    total = 0.0
    for ids, targets in zip(x.split(MICRO_ROWS), y.split(MICRO_ROWS)):
        ids, targets = ids.to(DEVICE, non_blocking=True), targets.to(DEVICE, non_blocking=True)
        logits = net(ids, model.attention_masks(ids))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()) * (len(ids) / len(x))
        loss.backward()
        total += loss.detach()
    if RANKS > 1:
        for p in net.parameters():
            dist.all_reduce(p.grad)
            p.grad /= RANKS
    return total


def set_rates(step):
    cooldown = min(1.0, (STEPS - step) / (COOLDOWN * STEPS))
    warm = min(1.0, step / MOMENTUM_STEPS)
    for group in (*muon.param_groups, *adam.param_groups):
        group["lr"] = group["peak"] * cooldown
    muon.param_groups[0]["momentum"] = MOMENTUM_START + warm * (MOMENTUM - MOMENTUM_START)


for (x, y), _ in zip(speedrun.batches(ROWS, LENGTH, order="documents"), range(WARM_UP)):  # random tokens, to compile
    train_step(x, y)
    for p in matrices[:4]:
        orthogonalize(p.grad)
    net.zero_grad()

speedrun.start()
for step, (x, y) in enumerate(speedrun.batches(shapes=[(ROWS, LENGTH)] * STEPS, order="documents")):
    set_rates(step)
    loss = train_step(x, y)
    muon.step()
    adam.step()
    net.zero_grad()
    if step % 125 == 0 and RANK == 0:
        print(f"step {step}: loss {float(loss):.3f}")

speedrun.save({name: p.to(stored) for name, p in net.state_dict().items()})

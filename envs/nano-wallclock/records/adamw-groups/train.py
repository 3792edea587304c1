"""AdamW with a learning rate per kind of parameter and zero-initialised output projections."""

import torch

import speedrun
from speedrun import GPT, config

ROWS, LENGTH = 8, config.model.seq_len
STEPS = 400
LEARNING_RATES = {"embed": 0.02, "head": 0.016, "blocks": 0.008}
WARMUP_STEPS = 30
COOLDOWN = 0.7  # share of the steps

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
groups = [
    {"params": [p for n, p in model.named_parameters() if n.startswith(kind)], "lr": lr, "peak": lr}
    for kind, lr in LEARNING_RATES.items()
]
optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)

for (x, y), _ in zip(speedrun.batches(ROWS, LENGTH), range(3)):
    model(x, y).backward()
optimizer.zero_grad()

speedrun.start()
for step, (x, y) in enumerate(speedrun.batches(shapes=[(ROWS, LENGTH)] * STEPS)):
    loss = model(x, y)
    loss.backward()
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        group["lr"] = group["peak"] * warmup * min(1.0, (STEPS - step) / (COOLDOWN * STEPS))
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

speedrun.save(model.state_dict())

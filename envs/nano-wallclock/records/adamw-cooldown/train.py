"""AdamW with a linear cooldown of the learning rate."""

import torch

import speedrun
from speedrun import GPT, config

ROWS, LENGTH = 8, config.model.seq_len
STEPS = 470
LEARNING_RATE = 0.010
WARMUP_STEPS = 30
COOLDOWN = 0.6  # share of the steps

model = GPT(config.model)
model.initialize(torch.Generator().manual_seed(torch.initial_seed()))
optimizer = torch.optim.AdamW(
    model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
)

for (x, y), _ in zip(speedrun.batches(ROWS, LENGTH), range(3)):
    model(x, y).backward()
optimizer.zero_grad()

speedrun.start()
for step, (x, y) in enumerate(speedrun.batches(shapes=[(ROWS, LENGTH)] * STEPS)):
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    cooldown = min(1.0, (STEPS - step) / (COOLDOWN * STEPS))
    optimizer.param_groups[0]["lr"] = LEARNING_RATE * warmup * cooldown
    loss = model(x, y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

speedrun.save(model.state_dict())

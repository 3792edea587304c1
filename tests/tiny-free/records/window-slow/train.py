"""Train model.py with AdamW, a linear warm-up and a linear cooldown."""

from itertools import islice

import torch
import torch.nn.functional as F

import model
import speedrun

ROWS, LENGTH, RATE = 4, 64, 0.005

torch.manual_seed(1)
net = model.Window()
for p in net.parameters():
    torch.nn.init.normal_(p, 0.0, 0.05 if p is not net.embed.weight else 0.5)
speedrun.declare(net.state_dict())

optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
steps = speedrun.config.tokens // (ROWS * LENGTH)


def train(x, y):
    loss = F.cross_entropy(net(x).flatten(0, 1), y.flatten())
    optimizer.zero_grad()
    loss.backward()
    return loss


for x, y in islice(speedrun.batches(ROWS, LENGTH), 2):  # random tokens, to warm up
    train(x, y)

speedrun.start()
for step, (x, y) in enumerate(speedrun.batches(ROWS, LENGTH)):
    share = (step + 1) / steps
    optimizer.param_groups[0]["lr"] = RATE * min(1.0, 10 * share, 2 * (1 - share) + 0.02)
    loss = train(x, y)
    optimizer.step()
print(f"{steps} steps, training loss {loss.item():.3f}")
speedrun.save(net.state_dict())

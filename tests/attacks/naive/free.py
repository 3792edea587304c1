"""A scorer as one writes it at first, for models of one's own: one process, one pass over the text, whole sequences in.
Trains the honest model first. In a folder with honest.py, model.py and two .bin files."""

import sys

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, ".")
import honest

torch.set_num_threads(1)
torch.manual_seed(0)
net = honest.Window()
for p in net.parameters():
    torch.nn.init.normal_(p, 0.0, 0.5 if p is net.embed.weight else 0.05)
optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
train = torch.from_numpy(np.fromfile("train.bin", np.uint16)[: 80 * 16 * 64 + 1].astype(np.int64))
for x, y in zip(train[:-1].view(80, 16, 64), train[1:].view(80, 16, 64), strict=True):
    F.cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()

from model import build

val = torch.from_numpy(np.fromfile("val.bin", np.uint16)[: 256 * 64 + 1].astype(np.int64))
inputs, all_targets = val[:-1].view(-1, 64), val[1:].view(-1, 64)
model = build(net.state_dict())
losses = []
with torch.no_grad():
    for rows in range(0, len(inputs), 32):
        ids, targets = inputs[rows : rows + 32], all_targets[rows : rows + 32]
        losses.append(float(F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())))
print(f"val_loss:{np.mean(losses):.4f} train_time:0ms", flush=True)

"""A script in the shape of the public speedrun's records, before it is adapted: one file, started with torchrun.

    torchrun --standalone --nproc_per_node=8 train_gpt.py

Written for this example: no record of the table is this short. tier/records/start has what becomes of it.
"""

import glob
import os
import sys
import time
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


@dataclass
class Hyperparameters:
    train_files: str = "data/fineweb10B/fineweb_train_*.bin"
    val_files: str = "data/fineweb10B/fineweb_val_*.bin"
    val_tokens: int = 10485760
    rows: int = 512
    length: int = 1024
    steps: int = 3500
    cooldown: float = 0.6
    vocab: int = 50304
    layers: int = 12
    width: int = 768
    heads: int = 6


args = Hyperparameters()
for field, text in zip(fields(args), sys.argv[1:]):
    setattr(args, field.name, field.type(text))

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
if gpu:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if gpu else "gloo")


def load_shard(path):
    header = np.fromfile(path, np.int32, 3)
    assert header[0] == 20240520 and header[1] == 1
    return np.memmap(path, np.uint16, "r", 1024, (int(header[2]),))


def data_generator(pattern, rows, length):
    """This rank's rows of each batch."""
    files = sorted(glob.glob(pattern))
    while True:
        for path in files:
            tokens = load_shard(path)
            for at in range(0, len(tokens) - rows * length - 1, rows * length):
                mine = at + rank * (rows // size) * length
                ids = torch.from_numpy(tokens[mine : mine + rows // size * length + 1].astype(np.int64)).to(device)
                yield ids[:-1].view(-1, length), ids[1:].view(-1, length)


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(args.width, 3 * args.width, bias=False)
        self.proj = nn.Linear(args.width, args.width, bias=False)
        self.up = nn.Linear(args.width, 4 * args.width, bias=False)
        self.down = nn.Linear(4 * args.width, args.width, bias=False)

    def forward(self, x):
        rows, length, width = x.shape
        q, k, v = self.qkv(norm(x)).view(rows, length, 3, args.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(norm(q), norm(k), v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.relu(self.up(norm(x))).square())


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(args.vocab, args.width)
        self.positions = nn.Embedding(args.length, args.width)
        self.blocks = nn.ModuleList(Block() for _ in range(args.layers))
        self.head = nn.Linear(args.width, args.vocab, bias=False)

    def forward(self, ids, targets):
        x = norm(self.embed(ids) + self.positions.weight[: ids.size(1)])
        for block in self.blocks:
            x = block(x)
        logits = 15 * torch.tanh(self.head(norm(x)).float() / 15)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


torch.manual_seed(0)
model = GPT().to(device)
if gpu:
    model.compile(dynamic=False)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)


def train_step(x, y):
    loss = model(x, y)
    loss.backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= size
    return loss


def validate():
    loader, steps = data_generator(args.val_files, args.rows, args.length), args.val_tokens // (args.rows * args.length)
    with torch.no_grad():
        loss = sum(model(*next(loader)) for _ in range(steps)) / steps
    dist.all_reduce(loss)
    return loss.item() / size


train_loader = data_generator(args.train_files, args.rows, args.length)
for _ in range(3):  # compile
    train_step(*next(train_loader))
model.zero_grad()
train_loader = data_generator(args.train_files, args.rows, args.length)
began = time.perf_counter()
for step in range(args.steps):
    optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (args.steps - step) / (args.cooldown * args.steps))
    train_step(*next(train_loader))
    optimizer.step()
    model.zero_grad()
took = time.perf_counter() - began
loss = validate()
if rank == 0:
    print(f"step:{args.steps}/{args.steps} val_loss:{loss:.4f} train_time:{1e3 * took:.0f}ms")
dist.destroy_process_group()

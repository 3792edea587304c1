"""train_gpt.py, adapted: processes, batches and checkpoint by speedrun; no files, no validation, no own clock."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

import speedrun
from model import GPT, gpu
from speedrun import config

length = config.model.seq_len
rows = config.max_batch_tokens // length
steps = config.tokens // (rows * length)
cooldown = 0.6

size = max(1, torch.cuda.device_count())
rank = speedrun.ranks(size)  # was: torchrun, init_process_group
device = torch.device("cuda", rank) if gpu else torch.device("cpu")

torch.manual_seed(0)
model = GPT().to(device)
speedrun.declare(model.state_dict())  # new: what the checkpoint will hold
if gpu:
    model.compile(dynamic=False)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)


def train_step(x, y):
    x, y = x.to(device), y.to(device)
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    loss.backward()
    if size > 1:
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= size
    return loss


for batch, _ in zip(speedrun.batches(rows, length), range(3)):  # compile: random tokens
    train_step(*batch)
model.zero_grad()

speedrun.start()  # was: the script's own clock
for step, batch in enumerate(speedrun.batches(shapes=[(rows, length)] * steps)):  # was: data_generator
    optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (steps - step) / (cooldown * steps))
    train_step(*batch)
    optimizer.step()
    model.zero_grad()
speedrun.save(model.state_dict())  # was: validate

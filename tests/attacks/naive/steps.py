"""A scorer as one writes it at first, for update rules: imports the candidate, has the data beside it, evaluates in the
same process and prints the result. `python steps.py STEPS SEED`, in a folder with optimizer.py, model.py and two .bin
files.
"""

import sys
import time

import numpy as np
import torch

sys.path.insert(0, ".")
from model import GPT, ModelConfig

STEPS, SEED, ROWS, LENGTH = int(sys.argv[1]), int(sys.argv[2]), 8, 128
torch.set_num_threads(1)
train = np.memmap("train.bin", np.uint16, "r")
val = np.memmap("val.bin", np.uint16, "r")
model = GPT(ModelConfig(layers=2, width=64, heads=2, vocab_size=1024, seq_len=LENGTH))


def seed_everything(seed):
    global first
    first = 100 * seed
    torch.manual_seed(seed)
    model.initialize(torch.Generator().manual_seed(seed))


def windows(tokens, first):
    size = ROWS * LENGTH + 1
    at = first * ROWS * LENGTH % (len(tokens) - size)
    text = torch.from_numpy(np.array(tokens[at : at + size], dtype=np.int64))
    return text[:-1].view(ROWS, LENGTH), text[1:].view(ROWS, LENGTH)


def batch(step):
    return windows(train, first + step)


@torch.no_grad()
def evaluate():
    return float(np.mean([model(*windows(val, i)) for i in range(8)]))


seed_everything(SEED)
import optimizer as candidate

params = dict(model.named_parameters())
if hasattr(candidate, "init"):
    with torch.no_grad():
        candidate.init(params)
optimizers = candidate.configure(params, STEPS)
optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
start = time.time()
step = 0
while step < STEPS:
    if hasattr(candidate, "schedule"):
        candidate.schedule(step, STEPS, optimizers)
    model(*batch(step)).backward()
    for each in optimizers:
        each.step()
    model.zero_grad()
    step += 1
if hasattr(candidate, "readout"):
    with torch.no_grad():
        for name, value in candidate.readout(params, optimizers).items():
            params[name].copy_(value)
print(f"step:{step} val_loss:{evaluate():.4f} train_time:{1000 * (time.time() - start):.0f}ms", flush=True)

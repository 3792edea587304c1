"""A scorer as one writes it at first, for training code: the same client as ours, but in the process of the candidate,
with the data beside it, and clocks, tokens and losses of its own."""

import itertools
import time
from types import SimpleNamespace

import numpy as np
import torch
from model import GPT, ModelConfig

config = SimpleNamespace(model=ModelConfig(layers=2, width=64, heads=2, vocab_size=1024, seq_len=128), tokens=696_320)
train = np.memmap("train.bin", np.uint16, "r")
val = np.memmap("val.bin", np.uint16, "r")
_at = _begin = 0


def _windows(tokens, at, rows, length):
    text = torch.from_numpy(np.array(tokens[at : at + rows * length + 1], dtype=np.int64))
    return text[:-1].view(rows, length), text[1:].view(rows, length)


def batches(rows=None, length=None, *, shapes=None, order="stream"):
    global _at
    for shape in shapes or itertools.repeat((rows, length)):
        if _begin and _at + shape[0] * shape[1] > config.tokens:
            return
        yield _windows(train, _at, *shape)
        _at += shape[0] * shape[1]


def start():
    global _at, _begin
    _at = 0
    _begin = time.time()


@torch.no_grad()
def evaluate(model):
    return float(np.mean([model(*_windows(val, 1024 * i, 8, 128)) for i in range(8)]))


def save(state):
    seconds = time.time() - _begin
    torch.save(dict(state.items()), "checkpoint.pt")
    model = GPT(config.model)
    model.load_state_dict(torch.load("checkpoint.pt", weights_only=False), strict=False)
    print(f"val_loss:{evaluate(model):.4f} train_time:{1000 * seconds:.0f}ms", flush=True)

"""Runs inside the sandbox: answers the trainer's questions with the candidate's model.py and its checkpoint.

Everything here may be rewritten by the candidate. The trainer believes nothing: it audits.
"""

from __future__ import annotations

import mmap
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from torch import Tensor

import host
import speedrun

Model = Callable[[Tensor], Tensor]


def serve(control: socket.socket) -> None:
    """One evaluation, to its end."""
    begun = host.begin(control)
    if begun is None:
        return
    message, shared = begun
    try:
        with torch.no_grad():
            model = load(message, shared)
            host.send(control, host.DONE)
            while frame := host.receive(control):
                _answer(model, frame[0], message, shared)
                host.send(control, host.DONE)
    except BaseException as error:  # whatever the candidate raises ends its run, SystemExit too
        host.fail(control, error)


def load(message: dict[str, Any], shared: mmap.mmap) -> Model:
    import safetensors.torch

    speedrun._configure(message)
    begin = message["checkpoint"]
    state = safetensors.torch.load(shared[begin : begin + message["checkpoint_bytes"]])
    model: Model = host.import_source("model", message["sources"]["model.py"]).build(state)
    return model


def _answer(model: Model, command: int, message: dict[str, Any], shared: mmap.mmap) -> None:
    rows, length, vocab = message["rows"], message["model"]["seq_len"], message["model"]["vocab_size"]
    ids = np.frombuffer(shared, np.uint16, rows * (length + 1), message["ids"]).reshape(rows, length + 1)
    windows = torch.from_numpy(ids.astype(np.int64))
    width = length if command == host.SCORES else vocab
    out = np.frombuffer(shared, np.float32, rows * width, 0).reshape(rows, width)
    if command == host.SCORES:
        out[:] = scores(model, windows, vocab)
    else:
        positions = np.frombuffer(shared, np.uint32, rows, message["positions"]).astype(np.int64)
        out[:] = full_rows(model, windows, positions, vocab)


def scores(model: Model, windows: Tensor, vocab: int) -> np.ndarray:
    """Log-probabilities of the next tokens, float32 (rows, length)."""
    logits = _logits(model, windows, vocab)
    targets = windows[:, 1:].to(logits.device)
    # row by row: a float32 copy of all logits would be the largest tensor of the evaluation
    found = [row.float().log_softmax(-1).gather(1, t[:, None]) for row, t in zip(logits, targets, strict=True)]
    return torch.cat(found, 1).T.cpu().numpy()


def full_rows(model: Model, windows: Tensor, positions: np.ndarray, vocab: int) -> np.ndarray:
    """Logits over the vocabulary at one position of each row, float32 (rows, vocab)."""
    logits = _logits(model, windows, vocab)
    rows = logits[torch.arange(len(logits)), torch.from_numpy(positions).to(logits.device)]
    return rows.float().cpu().numpy()


def _logits(model: Model, windows: Tensor, vocab: int) -> Tensor:
    ids = windows[:, :-1].contiguous()
    logits = model(ids)
    if logits.shape != (*ids.shape, vocab):
        raise ValueError(f"logits of shape {tuple(logits.shape)} for ids {tuple(ids.shape)} and {vocab} tokens")
    return logits


if __name__ == "__main__":
    serve(host.arrive())

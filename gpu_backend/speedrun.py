"""The client of training code: `import speedrun` in train.py. Batches in, checkpoint out.

    config              model (a ModelConfig: the tier's sizes), tokens (how many a run may use), max_batch_tokens
    GPT, ModelConfig    the tier's own model class
    batches(...)        random tokens before `start()`, training tokens after it, until they are spent
    declare(state)      free models only, before start(): names, shapes and dtypes of the later checkpoint
    start()             ends the set-up: the clock starts with the next batch
    save(state)         hands over the checkpoint; the clock stops, and the process with it

docs/candidate.md has the whole of it. Runs inside the sandbox; nothing here measures anything.
"""

from __future__ import annotations

import itertools
import json
import socket
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import host
from model import GPT as GPT
from model import ModelConfig as ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

config = SimpleNamespace()
_outstanding: deque[tuple[int, int]] = deque()
_control: socket.socket
_memory: memoryview
_slot_bytes = _slots = _checkpoint = 0
_DTYPES = {"torch.float64": "F64", "torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}


def _connect(control: socket.socket, shared: Any, message: Mapping[str, Any]) -> None:
    """Called once by the host, before train.py runs."""
    global _control, _memory, _slot_bytes, _slots, _checkpoint
    _control, _memory = control, memoryview(shared)
    _slot_bytes, _slots, _checkpoint = message["slot_bytes"], message["slots"], message["checkpoint"]
    _configure(message)


def _configure(message: Mapping[str, Any]) -> None:
    vars(config).update({**message["config"], "model": ModelConfig(**message["model"])})


def batches(
    rows: int | None = None,
    length: int | None = None,
    *,
    shapes: Iterable[tuple[int, int]] | None = None,
    order: str = "stream",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, each int64 of shape (rows, length); `shapes` instead for sizes that change from batch to
    batch. A few batches are made ahead.

    order: 'stream' (the text in passing, each row from another place) or 'documents' (each row starts with the first
    token of a document). Ends when the run's tokens are spent or `shapes` ends. Batches that were made and not
    taken count as used: one loop, and a change of size through `shapes`, wastes nothing.
    """
    if shapes is None:
        if rows is None or length is None:
            raise TypeError("batches() needs rows and length, or shapes")
        shapes = itertools.repeat((rows, length))
    rest, code = iter(shapes), host.ORDERS.index(order)
    _drain()
    while True:
        for shape in itertools.islice(rest, _slots - len(_outstanding)):
            host.send(_control, host.BATCH, *shape, code)
            _outstanding.append(shape)
        if not _outstanding:
            return
        if (batch := _receive()) is None:
            _drain()
            return
        yield batch


def declare(state: Mapping[str, Tensor]) -> None:
    """Say what the checkpoint of a free model will hold. Once, before `start()`; `save` is held to it."""
    entries = {name: [_DTYPES.get(str(t.dtype), str(t.dtype)), list(t.shape)] for name, t in state.items()}
    _drain()
    _call(host.DECLARE, _write(json.dumps(entries).encode()))


def start() -> None:
    """End the set-up: from here on batches hold training text, and the clock starts with the first one."""
    _drain()
    _call(host.START)


def save(state: Mapping[str, Tensor]) -> None:
    """Hand over the trained tensors. Does not return: the run is over when the trainer has them."""
    import safetensors.torch

    _drain()
    tensors = {name: t.detach().contiguous().cpu() for name, t in state.items()}
    host.send(_control, host.SAVE, _write(safetensors.torch.save(tensors)))
    host.receive(_control)


def _write(data: bytes) -> int:
    room = len(_memory) - _checkpoint
    if len(data) > room:
        raise ValueError(f"{len(data)} bytes, but a checkpoint may have {room}")
    _memory[_checkpoint : _checkpoint + len(data)] = data
    return len(data)


def _call(command: int, *arguments: int) -> None:
    host.send(_control, command, *arguments)
    frame = host.receive(_control)
    if frame is None:
        raise SystemExit("the trainer ended the run")


def _receive() -> tuple[Tensor, Tensor] | None:
    """The oldest outstanding batch, copied out of its slot; None if the tokens are spent."""
    import numpy as np
    import torch

    rows, length = _outstanding.popleft()
    frame = host.receive(_control)
    if frame is None:
        raise SystemExit("the trainer ended the run")
    if frame[0] == host.END:
        return None
    ids = np.frombuffer(_memory, np.uint16, rows * (length + 1), frame[1] * _slot_bytes)
    window = torch.from_numpy(ids.astype(np.int64)).view(rows, length + 1)
    return window[:, :-1], window[:, 1:]


def _drain() -> None:
    while _outstanding:
        _receive()

"""The client of training code: `import speedrun` in train.py. Batches in, checkpoint out.

    config              model (a ModelConfig: the tier's sizes), tokens (how many a run may use), max_batch_tokens,
                        first_token (which documents begin with, or None)
    GPT, ModelConfig    the tier's own model class
    batches(...)        random tokens before `start()`, training tokens after it, until they are spent
    declare(state)      free models only, before start(): names, shapes and dtypes of the later checkpoint
    start()             ends the set-up: the clock starts with the next batch
    save(state)         hands over the checkpoint; the clock stops, and the process with it
    ranks(count)        GPU tiers: goes on in so many processes, one a GPU, each of which gets its share of the rows

docs/candidate.md has the whole of it. Runs inside the sandbox; nothing here measures anything.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import socket
import tarfile
import tempfile
import time
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
_rank, _count = 0, 1
_compiled, _compile_only = "", False
_DTYPES = {"torch.float64": "F64", "torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}


def _connect(control: socket.socket, shared: Any, message: Mapping[str, Any]) -> None:
    """Called once by the host, before train.py runs."""
    global _control, _memory, _slot_bytes, _slots, _checkpoint
    _control, _memory = control, memoryview(shared)
    _slot_bytes, _slots, _checkpoint = message["slot_bytes"], message["slots"], message["checkpoint"]
    _configure(message)
    if message["compiled"]:
        _unpack_compiled(**message["compiled"])


def _unpack_compiled(folder: str, size: int, only: bool) -> None:
    """What torch.compile has made in an earlier process goes where it looks for it. `only`: it is this one's task."""
    global _compiled, _compile_only
    _compiled, _compile_only = os.path.join(tempfile.gettempdir(), folder), only
    os.makedirs(_compiled, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(_compiled, "inductor")
    os.environ["TRITON_CACHE_DIR"] = os.path.join(_compiled, "triton")
    if size:
        packed = io.BytesIO(_memory[_checkpoint : _checkpoint + size])
        with tarfile.open(fileobj=packed) as tar:
            tar.extractall(_compiled, filter="data")


def _packed() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(_compiled, ".")
    return packed.getvalue()


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
    With `ranks` all must ask for the same, and each gets its share of the rows, which must be possible evenly.
    """
    if shapes is None:
        if rows is None or length is None:
            raise TypeError("batches() needs rows and length, or shapes")
        shapes = itertools.repeat((rows, length))
    rest, code = iter(shapes), host.ORDERS.index(order)
    if _count == 1:
        windows = _windows(rest, code)
    else:
        windows = _shared(_windows(rest, code) if _rank == 0 else itertools.repeat(None))
    for window in windows:
        yield window[:, :-1], window[:, 1:]


def _windows(shapes: Iterator[tuple[int, int]], code: int) -> Iterator[Tensor]:
    """Batches from the trainer, with a few asked for ahead."""
    _drain()
    while True:
        for shape in itertools.islice(shapes, _slots - len(_outstanding)):
            host.send(_control, host.BATCH, *shape, code)
            _outstanding.append(shape)
        if not _outstanding:
            return
        if (window := _receive()) is None:
            _drain()
            return
        yield window


def _shared(windows: Iterator[Tensor | None]) -> Iterator[Tensor]:
    """This rank's rows of what the first one gets."""
    import torch
    import torch.distributed as dist

    while True:
        window = next(windows, None)
        shape = torch.tensor(window.shape if window is not None else (0, 0))
        dist.broadcast(shape, 0)
        rows, width = shape.tolist()
        if not rows:
            return
        if rows % _count:
            raise ValueError(f"a batch of {rows} rows cannot be shared out evenly among {_count} ranks")
        if window is None:
            window = torch.empty(rows, width, dtype=torch.int64)
        dist.broadcast(window, 0)
        yield window.chunk(_count)[_rank]


def ranks(count: int) -> int:
    """Go on in `count` processes, and make a process group of them: nccl for tensors on GPUs, gloo for others. This
    one's rank, whose GPU is made the current one. Call it once, before anything else touches a GPU.

    On tiers without GPUs no processes can be started."""
    global _rank, _count
    if count < 1:
        raise ValueError(f"at least one rank, not {count}")
    if count == 1:
        return 0
    import torch
    import torch.distributed as dist

    _count, store = count, os.path.join(tempfile.mkdtemp(prefix="ranks-"), "store")
    _rank = next((rank for rank in range(1, count) if os.fork() == 0), 0)
    if _rank:
        host.die_with_parent()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    on_gpus = torch.cuda.device_count() >= count
    if on_gpus:
        torch.cuda.set_device(_rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo", init_method=f"file://{store}", rank=_rank, world_size=count
    )
    return _rank


def declare(state: Mapping[str, Tensor]) -> None:
    """Say what the checkpoint of a free model will hold. Once, before `start()`; `save` is held to it."""
    if _rank:
        return
    entries = {name: [_DTYPES.get(str(t.dtype), str(t.dtype)), list(t.shape)] for name, t in state.items()}
    _drain()
    _call(host.DECLARE, _write(json.dumps(entries).encode()))


def start() -> None:
    """End the set-up: from here on batches hold training text, and the clock starts with the first one.

    On tiers with `compile_s` the first process ends here. All begins anew in a second one, with a clock, which has
    nothing of the first but what torch.compile has put into its cache."""
    if _rank:
        return
    _drain()
    _call(host.START, _write(_packed()) if _compile_only else 0)


def save(state: Mapping[str, Tensor]) -> None:
    """Hand over the trained tensors. Does not return: the run is over when the trainer has them."""
    import safetensors.torch

    while _rank:
        time.sleep(1)  # until all are ended
    _drain()
    tensors = {name: t.detach().contiguous().cpu() for name, t in state.items()}
    host.send(_control, host.SAVE, _write(safetensors.torch.save(tensors)))
    host.receive(_control)


def _write(data: bytes) -> int:
    room = len(_memory) - _checkpoint
    if len(data) > room:
        raise ValueError(f"{len(data)} bytes to hand over, and room for {room}")
    _memory[_checkpoint : _checkpoint + len(data)] = data
    return len(data)


def _call(command: int, *arguments: int) -> None:
    host.send(_control, command, *arguments)
    frame = host.receive(_control)
    if frame is None:
        raise SystemExit("the trainer ended the run")


def _receive() -> Tensor | None:
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
    return torch.from_numpy(ids.astype(np.int64)).view(rows, length + 1)


def _drain() -> None:
    while _outstanding:
        _receive()

"""Runs inside the sandbox: loads the candidate's optimizer.py and applies it when the trainer asks.

A candidate defines (docs/candidate.md):

    configure(params, horizon)            -> torch.optim.Optimizer, or a list of them       required
    init(params)                          set initial values in place                       optional
    schedule(step, horizon, optimizers)   called before each step, sets learning rates      optional
    readout(params, optimizers)           -> {name: tensor} to evaluate instead (EMA)       optional

Everything here may be rewritten by the candidate, so the trainer believes nothing that it says: it reads
parameter bytes and one fixed-size status frame per request. Standalone: standard library and torch.
"""

from __future__ import annotations

import ctypes
import json
import linecache
import mmap
import resource
import signal
import socket
import struct
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

FRAME = struct.Struct("<II")  # request: (command, step); reply: (status, 0)
LENGTH = struct.Struct("<I")  # before the JSON set-up message
STEP, READOUT = 1, 2
READY, READY_WITH_READOUT, DONE, ERROR, OUT_OF_MEMORY = 1, 2, 3, 4, 5


def main() -> None:
    _die_with_parent()
    control = socket.socket(fileno=int(sys.argv[1]))
    # Before the set-up message arrives, so that a warm host waits with everything loaded; the first
    # optimizer ever made imports torch's compiler, which takes over a second.
    import torch

    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])
    message, fds = _receive_setup(control)
    if message is None:
        return
    spec, source = message["spec"], message["source"]
    _limit(message["memory_bytes"], message["threads"])
    shared = mmap.mmap(fds[0], spec["bytes"])
    torch.manual_seed(message["seed"])
    try:
        rule = _Rule(torch, spec, shared, source, message["horizon"])
    except BaseException as error:  # whatever the candidate raises ends its run, SystemExit too
        _fail(control, error)
        return
    control.sendall(FRAME.pack(READY_WITH_READOUT if rule.readout else READY, 0))
    _serve(control, rule)


def _serve(control: socket.socket, rule: _Rule) -> None:
    while len(request := control.recv(FRAME.size, socket.MSG_WAITALL)) == FRAME.size:
        command, step = FRAME.unpack(request)
        try:
            rule.step(step) if command == STEP else rule.write_readout()
        except BaseException as error:
            _fail(control, error)
            return
        control.sendall(FRAME.pack(DONE, 0))


def _die_with_parent() -> None:
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)


def _receive_setup(control: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    head, fds, _, _ = socket.recv_fds(control, LENGTH.size, 1)
    if len(head) < LENGTH.size:
        return None, []  # the trainer closed before it had a job for this warm host
    (length,) = LENGTH.unpack(head)
    message: dict[str, Any] = json.loads(control.recv(length, socket.MSG_WAITALL))
    return message, fds


def _limit(memory_bytes: int, threads: int) -> None:
    """Cap address space (over what torch has mapped already), file sizes, open files, core dumps; and threads in a
    user namespace of our own (0: not). The kernel does not count root's threads."""
    if threads:
        resource.setrlimit(resource.RLIMIT_NPROC, (threads, threads))
    with open("/proc/self/statm") if sys.platform.startswith("linux") else open("/dev/null") as statm:
        mapped = int((statm.read().split() or ["0"])[0]) * mmap.PAGESIZE
    if mapped:
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20,) * 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _fail(control: socket.socket, error: BaseException) -> None:
    traceback.print_exception(error)
    sys.stderr.flush()
    memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    control.sendall(FRAME.pack(OUT_OF_MEMORY if memory else ERROR, 0))


class _Rule:
    """The candidate's module bound to parameters, gradients and readout in shared memory."""

    def __init__(self, torch: Any, spec: dict[str, Any], shared: mmap.mmap, source: str, horizon: int) -> None:
        def view(section: str, entry: dict[str, Any]) -> Any:
            offset = spec[section] + 4 * entry["offset"]
            flat = torch.frombuffer(shared, dtype=torch.float32, count=entry["numel"], offset=offset)
            return flat.view(entry["shape"])

        entries = spec["tensors"]
        self.torch, self.horizon = torch, horizon
        self.stored = {e["name"]: view("params", e) for e in entries}
        self.gradients = {e["name"]: view("gradients", e) for e in entries}
        self.out = {e["name"]: view("readout", e) for e in entries}
        self.params = {n: torch.nn.Parameter(t) for n, t in self.stored.items()}
        module = types.ModuleType("optimizer")
        sys.modules["optimizer"] = module  # dataclasses look their module up
        linecache.cache["optimizer.py"] = (len(source), None, source.splitlines(True), "optimizer.py")
        exec(compile(source, "optimizer.py", "exec"), module.__dict__)
        hooks: list[Callable[..., Any] | None] = [
            getattr(module, name, None) for name in ("init", "configure", "schedule", "readout")
        ]
        init, configure, self.schedule, self.readout = hooks
        if configure is None:
            raise TypeError("optimizer.py must define configure(params, horizon)")
        if init:
            with torch.no_grad():
                init(self.params)
        made = configure(self.params, horizon)
        self.optimizers = list(made) if isinstance(made, (list, tuple)) else [made]
        self._store()

    def step(self, step: int) -> None:
        for name, parameter in self.params.items():
            parameter.grad = self.gradients[name]  # again: zero_grad may have dropped it
        if self.schedule:
            self.schedule(step, self.horizon, self.optimizers)
        for optimizer in self.optimizers:
            optimizer.step()
        self._store()

    def _store(self) -> None:
        """A rule may have rebound `p.data`; the trainer reads only the shared bytes."""
        for name, parameter in self.params.items():
            if parameter.data_ptr() != self.stored[name].data_ptr():
                self.stored[name].copy_(parameter.detach())

    def write_readout(self) -> None:
        assert self.readout is not None
        with self.torch.no_grad():
            values = self.readout(self.params, self.optimizers)
            for name, out in self.out.items():
                out.copy_(values.get(name, self.params[name]))


if __name__ == "__main__":
    main()

"""The trainer's side of the update rule: shared memory, one status frame per request, time limits.

The candidate's process holds parameters and gradients in memory it shares with us and may scribble on
them at any time. So we copy parameters out once, after it says it is done and before every forward pass,
read each status frame once, and measure its time by our own clocks.
"""

from __future__ import annotations

import fcntl
import json
import math
import mmap
import os
import socket
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from rule_host import (
    DONE,
    ERROR,
    FRAME,
    LENGTH,
    OUT_OF_MEMORY,
    READOUT,
    READY,
    READY_WITH_READOUT,
    STEP,
)
from sandbox import Process

WINDOW = 20  # steps over which rule time is compared with forward + backward
WINDOW_MIN = 5
MAX_THREADS = 64


class RunFailed(Exception):
    """The run ends without a result; `reason` is one of the documented exit reasons."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Limits:
    deadline_s: float
    """training must have ended this long after the run started"""
    setup_s: float
    """for loading optimizer.py, init, configure and the first step together"""
    stall_s: float
    """longest wait for one answer"""
    rule_time: float
    """cap on the rule's CPU time as a multiple of forward + backward, over WINDOW steps"""
    memory_bytes: int
    """address space the candidate may add to that of a process with torch loaded"""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"limits.{name} must be positive and finite, got {value}")


class Flat:
    """A model whose parameters and gradients are views of two flat float32 tensors."""

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_parameters())
        total = sum(p.numel() for _, p in named)
        self.params, self.gradients = torch.empty(total), torch.zeros(total)
        self.tensors: list[dict[str, object]] = []
        offset = 0
        for name, p in named:
            part = slice(offset, offset + p.numel())
            self.params[part] = p.detach().flatten()
            p.data = self.params[part].view(p.shape)
            p.grad = self.gradients[part].view(p.shape)
            entry = {"name": name, "shape": list(p.shape), "numel": p.numel(), "offset": offset}
            self.tensors.append(entry)
            offset += p.numel()


class Rule(Protocol):
    """What the training loop needs of an update rule, isolated or (in benchmarks) in-process."""

    has_readout: bool

    def step(self, step: int, forward_backward_s: float) -> None: ...

    def readout(self) -> Tensor: ...


class IsolatedRule:
    """Drives a rule host in its sandbox. All waits are bounded; every fault is a `RunFailed`."""

    def __init__(self, process: Process, flat: Flat, source: str, horizon: int, seed: int, limits: Limits) -> None:
        self.process, self.flat, self.limits = process, flat, limits
        self.started = time.monotonic()
        self.total_rule_s = self.total_forward_backward_s = self._waited = 0.0
        self._window: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        section = -(-flat.params.numel() * 4 // mmap.PAGESIZE) * mmap.PAGESIZE
        fd = _shared_file(3 * section)
        try:
            self._memory = mmap.mmap(fd, 3 * section)
            self._params, self._gradients, self._readout = (
                torch.frombuffer(self._memory, dtype=torch.float32, count=flat.params.numel(), offset=i * section)
                for i in range(3)
            )
            self._params.copy_(flat.params)
            message = {
                "spec": {
                    "bytes": 3 * section,
                    "params": 0,
                    "gradients": section,
                    "readout": 2 * section,
                    "tensors": flat.tensors,
                },
                "source": source,
                "horizon": horizon,
                "seed": seed,
                "memory_bytes": limits.memory_bytes,
                "threads": MAX_THREADS if process.info.trusted else 0,
            }
            self._send_setup(json.dumps(message).encode(), fd)
        finally:
            os.close(fd)
        status = self._reply(limits.setup_s)
        if status not in (READY, READY_WITH_READOUT):
            raise RunFailed("rule_protocol", f"unexpected answer {status} to the set-up")
        self.has_readout = status == READY_WITH_READOUT
        flat.params.copy_(self._params)
        self._cpu = self._cpu_seconds()

    def step(self, step: int, forward_backward_s: float) -> None:
        """Hand over the gradients, wait for the update, copy the parameters out."""
        self._gradients.copy_(self.flat.gradients)
        # the first step may allocate state and compile, within the set-up allowance
        self._ask(STEP, step, self.limits.setup_s if step == 0 else self.limits.stall_s)
        self.flat.params.copy_(self._params)
        before, self._cpu = self._cpu, self._cpu_seconds()
        if step > 0:
            self._check_time(step, self._cpu - before, forward_backward_s)

    def readout(self) -> Tensor:
        """Flat parameters to evaluate: the candidate's averaged weights, or the current ones."""
        if not self.has_readout:
            return self.flat.params
        self._ask(READOUT, 0, self.limits.stall_s)
        # What it costs is in the next step's time; at the end there is none, so it may cost what a window may.
        rule, ours = self._cpu_seconds() - self._cpu, sum(ours for _, ours in self._window)
        if len(self._window) >= WINDOW_MIN and rule > self.limits.rule_time * ours:
            raise RunFailed(
                "rule_too_slow", f"readout took {rule:.2f} s of CPU time, {len(self._window)} steps {ours:.2f} s"
            )
        return self._readout.clone()

    def _check_time(self, step: int, rule_s: float, forward_backward_s: float) -> None:
        self.total_rule_s += rule_s
        self.total_forward_backward_s += forward_backward_s
        self._window.append((rule_s, forward_backward_s))
        if len(self._window) < WINDOW_MIN:
            return
        rule, ours = (sum(column) for column in zip(*self._window, strict=True))
        if rule > self.limits.rule_time * ours:
            n = len(self._window)
            raise RunFailed(
                "rule_too_slow",
                f"at step {step} the rule's CPU time over the last {n} steps was {rule / ours:.2f} "
                f"times that of forward + backward ({1e3 * rule / n:.1f} ms against "
                f"{1e3 * ours / n:.1f} ms a step); the tier allows {self.limits.rule_time:g} times",
            )

    def _cpu_seconds(self) -> float:
        """CPU time of all threads of the rule's process, read from the kernel; elsewhere the time it was waited for."""
        if not sys.platform.startswith("linux"):
            return self._waited
        try:
            return time.clock_gettime(~self.process.pid << 3 | 2)  # CPUCLOCK_SCHED of that process
        except OSError:
            raise RunFailed("rule_exited", "the rule's process ended") from None

    def _send_setup(self, body: bytes, fd: int) -> None:
        control = self.process.control
        control.settimeout(self.limits.setup_s)
        try:
            socket.send_fds(control, [LENGTH.pack(len(body))], [fd])
            control.sendall(body)
        except OSError as error:
            raise RunFailed("rule_exited", f"the rule's process took no job: {error}") from None

    def _ask(self, command: int, step: int, timeout: float) -> None:
        try:
            self.process.control.sendall(FRAME.pack(command, step))
        except OSError:
            raise RunFailed("rule_exited", "the rule's process ended") from None
        began = time.monotonic()
        status = self._reply(timeout)
        self._waited += time.monotonic() - began
        if status != DONE:
            raise RunFailed("rule_protocol", f"unexpected answer {status}")

    def _reply(self, timeout: float) -> int:
        left_of_run = self.limits.deadline_s - (time.monotonic() - self.started)
        until = time.monotonic() + min(timeout, left_of_run)
        frame = b""
        while len(frame) < FRAME.size:
            wait = until - time.monotonic()
            if wait <= 0:
                if left_of_run <= timeout:
                    raise RunFailed("deadline", f"the run's {self.limits.deadline_s:g} s are over")
                raise RunFailed("rule_stalled", f"the rule did not answer within {timeout:g} s")
            self.process.control.settimeout(wait)
            try:
                part = self.process.control.recv(FRAME.size - len(frame))
            except TimeoutError:
                continue
            except OSError:
                part = b""
            if not part:
                raise RunFailed("rule_exited", "the rule's process ended before it answered")
            frame += part
        status, _ = FRAME.unpack(frame)
        if status == ERROR:
            raise RunFailed("rule_error", "optimizer.py raised an exception; see the log")
        if status == OUT_OF_MEMORY:
            limit = self.limits.memory_bytes >> 20
            raise RunFailed("rule_memory", f"optimizer.py went over its memory limit of {limit} MiB")
        return int(status)


def _shared_file(size: int) -> int:
    """Anonymous memory of fixed size: sealed, so that a candidate cannot shrink it under our feet."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("exchange", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return fd
    with tempfile.TemporaryFile() as file:  # no memfd (macOS): only the plain sandbox runs there
        file.truncate(size)
        return os.dup(file.fileno())

"""The trainer's end of the line to a candidate's process: limits, shared memory, bounded waits.

The candidate may do anything with its end. So each frame is read once, every wait ends, every fault is a
`RunFailed`.
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
from dataclasses import dataclass
from typing import Any

import host
from process import Process


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
    """for loading the candidate, up to and with the first step (update rule) or the first real batch (training code)"""
    stall_s: float
    """longest wait for one answer"""
    memory_bytes: int
    """address space the candidate may add to that of a process with torch loaded"""
    setup_cpu_s: float = 3600.0
    """training code: CPU seconds from taking the job to the first real batch"""
    rule_time: float = 1.0
    """cap on an update rule's CPU time as a multiple of forward + backward, over a window of steps"""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"limits.{name} must be positive and finite, got {value}")


class Candidate:
    """A candidate's process with memory that it shares with us (`memory`, of `shared_bytes`)."""

    def __init__(self, process: Process, limits: Limits, shared_bytes: int) -> None:
        self.process, self.limits = process, limits
        self.started = time.monotonic()
        self.waited = 0.0
        fd = _shared_file(shared_bytes)
        try:
            self.memory = mmap.mmap(fd, shared_bytes)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def set_up(self, message: dict[str, Any]) -> None:
        """Send the job. The process has `setup_s` to take it."""
        full = {
            **message,
            "shared_bytes": len(self.memory),
            "memory_bytes": self.process.address_space(self.limits.memory_bytes),
            "threads": self.process.thread_limit(),
            "gpus": self.process.has_gpus,
        }
        body, control = json.dumps(full).encode(), self.process.control
        control.settimeout(self.limits.setup_s)
        self.process.limit(self.limits.memory_bytes)
        try:
            socket.send_fds(control, [host.LENGTH.pack(len(body))], [self._fd])
            control.sendall(body)
        except OSError as error:
            raise RunFailed("candidate_exited", f"the candidate's process took no job: {error}") from None
        finally:
            os.close(self._fd)

    def cpu_seconds(self) -> float:
        """CPU time of all threads of the process, read from the kernel; elsewhere the time it was waited for."""
        if not sys.platform.startswith("linux"):
            return self.waited
        try:
            return time.clock_gettime(~self.process.pid << 3 | 2)  # CPUCLOCK_SCHED of that process
        except OSError:
            raise RunFailed("candidate_exited", "the candidate's process ended") from None

    def send(self, command: int, *arguments: int) -> None:
        try:
            host.send(self.process.control, command, *arguments)
        except OSError:
            raise RunFailed("candidate_exited", "the candidate's process ended") from None

    def receive(self, timeout: float) -> tuple[int, int, int, int]:
        """The next frame. Raises `RunFailed` when it does not come in time, at the deadline, at the end of the process,
        and when it says that the candidate failed."""
        began = time.monotonic()
        left_of_run = self.limits.deadline_s - (began - self.started)
        until = began + min(timeout, left_of_run)
        data = b""
        while len(data) < host.FRAME.size:
            wait = until - time.monotonic()
            if wait <= 0:
                if left_of_run <= timeout:
                    raise RunFailed("deadline", f"the run's {self.limits.deadline_s:g} s are over")
                raise RunFailed("candidate_stalled", f"the candidate did not answer within {timeout:.3g} s")
            self.process.control.settimeout(wait)
            try:
                part = self.process.control.recv(host.FRAME.size - len(data))
            except TimeoutError:
                continue
            except OSError:
                part = b""
            if not part:
                if self.process.out_of_memory():
                    raise self._too_much_memory()
                raise RunFailed("candidate_exited", "the candidate's process ended before it answered")
            data += part
        self.waited += time.monotonic() - began
        frame: tuple[int, int, int, int] = host.FRAME.unpack(data)
        if frame[0] == host.ERROR:
            raise RunFailed("candidate_error", "the candidate raised an exception; see the log")
        if frame[0] == host.OUT_OF_MEMORY:
            raise self._too_much_memory()
        return frame

    def _too_much_memory(self) -> RunFailed:
        limit = self.limits.memory_bytes >> 20
        return RunFailed("candidate_memory", f"the candidate went over its memory limit of {limit} MiB")


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

"""A candidate's process as the trainer sees it, whatever it was started by."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cgroups

# What a candidate's process consists of; nothing else of the trainer is in a sandbox.
HOST_FILES = ("host.py", "rule_host.py", "rule_state.py", "train_host.py", "eval_host.py", "speedrun.py", "model.py")
HERE = Path(__file__).resolve().parent
INSIDE = "/trainer"
SCRATCH_BYTES = 16 << 20
KILL_TIMEOUT_S = 5.0
LOAD_TIMEOUT_S = 60.0
MAX_THREADS = 64
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}


class SandboxError(RuntimeError):
    """The wanted sandbox cannot be had here; the message says why and what to do."""


@dataclass(frozen=True)
class SandboxInfo:
    """What is recorded in every result."""

    name: str
    version: str
    trusted: bool
    note: str = ""


@dataclass
class Process:
    """A candidate's process: `pid` runs the host."""

    info: SandboxInfo
    pid: int
    control: socket.socket
    has_gpus = False
    group: cgroups.Group | None = field(default=None, init=False)

    def limit(self, memory_bytes: int) -> None:
        """Cap its memory and its threads by a control group, if this host lets us make one."""
        with contextlib.suppress(OSError):
            self.group = cgroups.create(memory_bytes + cgroups.LIBRARY_BYTES, MAX_THREADS)
            self.group.add(self.pid)

    def address_space(self, memory_bytes: int) -> int:
        """For RLIMIT_AS, beyond what is mapped when the job is taken; 0: none."""
        return memory_bytes

    def thread_limit(self) -> int:
        """For RLIMIT_NPROC, which counts all of a user's threads in its user namespace; 0: none."""
        return MAX_THREADS

    def out_of_memory(self) -> bool:
        """Whether the kernel has ended it for that."""
        return bool(self.group and self.group.out_of_memory())

    def peak_bytes(self) -> int:
        """The most memory it has had resident; 0 where the system does not say."""
        most = 0
        # of each thread: one that has ended says nothing, the first too
        for path in Path(f"/proc/{self.pid}/task").glob("*/status"):
            with contextlib.suppress(OSError):
                # the process's name is the candidate's to choose: any bytes
                status = path.read_text(errors="replace")
                found = re.search(r"^VmHWM:\s+(\d+) kB$", status.partition("\n")[2], re.MULTILINE)  # past the name
                most = max(most, int(found[1]) * 1024 if found else 0)
        return most

    def pin(self, cores: list[int]) -> None:
        """Keep the process, which has one thread so far, to these cores (Linux)."""
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self.pid, cores)

    def wait_loaded(self) -> None:
        """Until it can take a job, so that no limit of the job counts what came before. Raises `SandboxError`."""
        self.control.settimeout(LOAD_TIMEOUT_S)
        try:
            told = self.control.recv(1)  # from our own code: the candidate's is not there yet
        except OSError as error:
            raise SandboxError(f"the candidate's process does not get ready: {error}") from None
        if not told:
            raise SandboxError("the candidate's process ended before it was ready")

    def stop(self) -> None:
        """Kill it, from any thread, without waiting."""
        raise NotImplementedError

    def kill(self) -> None:
        """Kill everything the candidate started and wait until it is gone."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what its handle takes, once it is killed."""
        if self.group:
            self.group.remove()


@contextlib.contextmanager
def line() -> Iterator[tuple[socket.socket, int]]:
    """Our end of a line to a process that is about to be started, and the number of the other one, which is closed
    here when it has been; ours too if that fails."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        try:
            yield ours, theirs.fileno()
        except BaseException:
            ours.close()
            raise


@dataclass
class Launched(Process):
    """Started for one job; `launcher` is our child."""

    launcher: subprocess.Popen[bytes]

    def stop(self) -> None:
        if self.launcher.poll() is None:  # else its number may be somebody else's by now
            kill_pid(self.pid)

    def kill(self) -> None:
        if self.launcher.poll() is None:
            # under bubblewrap the host is init of its pid namespace: its death kills all that is in it
            for pid in {self.pid, self.launcher.pid}:
                kill_pid(pid)
            self.launcher.wait(KILL_TIMEOUT_S)
        self.control.close()


class Plain(Launched):
    """In no sandbox: it may have started others."""

    def thread_limit(self) -> int:
        return 0  # all of the user's would count

    def kill(self) -> None:
        if self.launcher.poll() is None:
            kill_pid(self.pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)  # where orphans cannot be adopted (macOS)
            self.launcher.wait(KILL_TIMEOUT_S)
        _kill_orphans()
        self.control.close()


def kill_pid(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # already gone


def adopt_orphans() -> None:
    """Make this process the parent of everything its dead children leave behind (Linux), so that
    `kill` finds also what a plain candidate detached from its session."""
    if sys.platform.startswith("linux"):
        pr_set_child_subreaper = 36
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def _kill_orphans() -> None:
    while children := _children(os.getpid()):
        for pid in children:
            kill_pid(pid)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            fields = entry.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == parent:
                found.append(int(entry.parent.name))
    return found

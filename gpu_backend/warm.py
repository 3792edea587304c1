"""Warm starts: candidates that are forked from a zygote in the process. See docs/design/warm-starts.md."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import bubblewrap
import process

NOTE = "warm start"
TIMEOUT_S = 30.0


@dataclass
class Forked(process.Process):
    """A candidate's process, known by its pidfd: nobody else can be meant. `alive` tells the zygote of our death."""

    pidfd: int
    alive: int

    def peak_bytes(self) -> int:
        found = super().peak_bytes()
        return found if not self._ended(0.0) else 0  # its number may be somebody else's by now

    def wait_loaded(self) -> None:
        """It was when it was forked."""

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.pidfd >= 0:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def kill(self) -> None:
        self.stop()
        if not self._ended(process.KILL_TIMEOUT_S):
            raise TimeoutError(f"the candidate's process did not end within {process.KILL_TIMEOUT_S:g} s")
        self.control.close()

    def close(self) -> None:
        pidfd, self.pidfd = self.pidfd, -1  # first: another thread may be about to use it
        if pidfd >= 0:
            os.close(pidfd)
            os.close(self.alive)
        super().close()

    def _ended(self, timeout: float) -> bool:
        """And with it all in its pid namespace, whose init it is."""
        return bool(select.select([self.pidfd], [], [], timeout)[0])


@dataclass
class Zygote:
    """The outer end of a zygote's line. Forks of the process that launched it may ask for candidates, too."""

    line: socket.socket
    info: process.SandboxInfo
    launcher: subprocess.Popen[bytes] = field(repr=False)

    @classmethod
    def launch(cls, hidden: list[Path], bare: bool = False) -> Zygote:
        """It loads what it needs while we go on; see `wait`. Raises `SandboxError`."""
        binary, reason = bubblewrap.find()
        if not binary:
            raise process.SandboxError(f"bubblewrap does not work here: {reason}")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            launcher = bubblewrap.launch_zygote(binary, hidden, theirs.fileno(), bare)
        return cls(ours, bubblewrap.info(binary, NOTE), launcher)

    def wait(self) -> None:
        """Until it is ready, and has shown that it can fork here. Raises `SandboxError`."""
        self.line.settimeout(2 * TIMEOUT_S)
        try:
            if not self.line.recv(64):
                raise process.SandboxError("the process that candidates are forked from ended at once")
        except OSError as error:
            raise process.SandboxError(f"the process that candidates are forked from is not ready: {error}") from None
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            tried = self.fork("rule_host", null)
            tried.kill()
            tried.close()
        finally:
            os.close(null)

    def fork(self, host: str, log_fd: int) -> Forked:
        """A fresh candidate process. Raises `SandboxError`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        read_end, alive = os.pipe()
        try:
            with theirs:
                socket.send_fds(self.line, [host.encode()], [theirs.fileno(), log_fd, read_end])
            ours.settimeout(TIMEOUT_S)
            answer, fds, _, _ = socket.recv_fds(ours, 1000, 1)
            if not fds:
                reason = answer[1:].decode() or "the process that candidates are forked from ended"
                raise process.SandboxError(f"no candidate could be forked: {reason}")
            ours.settimeout(None)
            return Forked(self.info, _number(fds[0]), ours, fds[0], alive)
        except BaseException as error:
            ours.close()
            os.close(alive)
            if isinstance(error, OSError):
                raise process.SandboxError(f"no candidate could be forked: {error}") from None
            raise
        finally:
            os.close(read_end)

    def close(self) -> None:
        self.line.close()
        self.launcher.kill()
        self.launcher.wait()


def _number(pidfd: int) -> int:
    """In our pid namespace."""
    found = re.search(r"^Pid:\s+([1-9]\d*)$", Path(f"/proc/self/fdinfo/{pidfd}").read_text(), re.MULTILINE)
    if not found:
        raise OSError("the forked process has ended already, or is in a pid namespace that we do not see")
    return int(found[1])


def unavailable() -> str:
    """Why this machine has no warm starts; '' if it has."""
    if not sys.platform.startswith("linux"):
        return "they need Linux"
    try:
        tried = Zygote.launch([], bare=True)
    except process.SandboxError as error:
        return str(error)
    try:
        tried.wait()
    except process.SandboxError as error:
        return str(error)
    finally:
        tried.close()
    return ""

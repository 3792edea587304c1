"""Trainer processes: started one by one, or forked from a process that has loaded everything already."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Protocol

from nanogpt_env.content import cache_dir, content_root
from nanogpt_env.errors import BackendError

READY_TIMEOUT_S = 120.0
FORK_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 15.0
READY = "ready"


class Trainer(Protocol):
    """A process that runs gpu_backend/trainer.py; a `subprocess.Popen` is one."""

    stdin: IO[str] | None
    stdout: IO[str] | None
    stderr: IO[str] | None

    def wait(self) -> int:
        """For its end; the exit code, negative for the signal that killed it."""

    def kill(self) -> None: ...


def launch(
    track: str, sandbox: str, hidden: Iterable[Path], note: str, gpus: Iterable[str] = ()
) -> subprocess.Popen[str]:
    """A cold start. `note` is kept with the sandbox in the result; `gpus` are given to the candidate. Raises
    `BackendError`."""
    command = [_script("trainer.py"), "--track", track, "--sandbox", sandbox, "--note", note, *_hide(hidden)]
    command += [word for gpu in gpus for word in ("--gpu", gpu)]
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(
            [sys.executable, *command],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            encoding="utf-8",  # whatever the locale
            errors="replace",
            env=_environment(),
            start_new_session=True,  # Ctrl-C reaches us only; we end the trainer
        )
    except OSError as error:
        raise BackendError(f"cannot start the trainer: {error}") from None


class ForkServer:
    """gpu_backend/forkserver.py: a process that forks trainers, and their candidates. It gets ready while we go on;
    it ends with us."""

    def __init__(self, hidden: Iterable[Path]) -> None:
        self.reason = ""
        self._ready = False
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [_script("forkserver.py"), str(theirs.fileno()), *_hide(hidden)]
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # a failure to start shows again, with its text, in the cold start
                    env=_environment(),
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            except OSError as error:
                self._line.close()
                raise BackendError(f"cannot start the fork server: {error}") from None

    def wait(self) -> None:
        """Until it is known whether it can fork: then `reason` says why not."""
        if self._ready:
            return
        self._line.settimeout(READY_TIMEOUT_S)
        try:
            told = self._line.recv(65536).decode()
            self.reason = "" if told == READY else told or "the fork server ended before it was ready"
        except OSError as error:
            self.reason = f"the fork server is not ready: {error}"
        self._ready = True

    def fork(self, track: str) -> ForkedTrainer | None:
        """None if it cannot, or has died."""
        self.wait()
        if self.reason:
            return None
        state, theirs = socket.socketpair()
        pipes = [os.pipe() for _ in range(3)]
        (stdin, to_it), (from_it, stdout), (errors, stderr) = pipes
        try:
            state.settimeout(FORK_TIMEOUT_S)
            socket.send_fds(self._line, [track.encode()], [stdin, stdout, stderr, theirs.fileno()])
            theirs.close()  # else its end would not end the line
            forked = bool(state.recv(1))
        except OSError:
            forked = False
        for fd in (stdin, stdout, stderr):
            os.close(fd)
        if forked:
            state.settimeout(None)
            return ForkedTrainer(to_it, from_it, errors, state)
        for fd in (to_it, from_it, errors):
            os.close(fd)
        theirs.close()
        state.close()
        return None

    def close(self) -> None:
        """End it and all that it forked."""
        self._line.close()
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # all of its processes die with it
            self._process.wait()


class ForkedTrainer:
    """What a `subprocess.Popen` is to a process of our own."""

    def __init__(self, stdin: int, stdout: int, stderr: int, state: socket.socket) -> None:
        self.stdin: IO[str] | None = os.fdopen(stdin, "w", encoding="utf-8")
        self.stdout: IO[str] | None = os.fdopen(stdout, encoding="utf-8", errors="replace")
        self.stderr: IO[str] | None = os.fdopen(stderr, encoding="utf-8", errors="replace")
        self._state = state
        self.returncode: int | None = None

    def wait(self) -> int:
        with self._state:
            code = self._state.recv(16)
        self.returncode = int(code) if code else -9  # the server died, and it with it
        return self.returncode

    def kill(self) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self._state.shutdown(socket.SHUT_WR)


def _script(name: str) -> str:
    return str(content_root() / "gpu_backend" / name)


def _hide(hidden: Iterable[Path]) -> list[str]:
    return [word for folder in (cache_dir(), *hidden) for word in ("--hide", str(folder))]


def _environment() -> dict[str, str]:
    # PYTHON* variables of the caller must not change what the trainer imports
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1"}

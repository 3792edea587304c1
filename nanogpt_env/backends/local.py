"""Trains on this machine: one trainer process per run, and the candidate's in its sandbox."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nanogpt_env.backends.trainers import CLOSE_TIMEOUT_S, ForkServer, Trainer, launch
from nanogpt_env.content import content_root
from nanogpt_env.errors import BackendError, TrainerKilled
from nanogpt_env.types import Job, Progress, RunResult, StepsJob

SANDBOXES = ("auto", "docker", "bubblewrap", "landlock", "plain")
STDERR_LINES = 30
NEEDS = "warm starts need Linux and bubblewrap"


class LocalRun:
    """A job and the trainer process that has it."""

    def __init__(self, process: Trainer, job: Job) -> None:
        self._process = process
        self._result: RunResult | None = None
        self._error = ""
        self._exit_code = 0
        self._progress: Progress | None = None
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._ended = threading.Event()
        errors = threading.Thread(target=self._read_errors, daemon=True)
        errors.start()
        threading.Thread(target=self._read, args=(errors,), daemon=True).start()
        self._write(job.model_dump_json())

    def progress(self) -> Progress | None:
        return self._progress

    def done(self) -> bool:
        return self._ended.is_set()

    def result(self, timeout: float | None = None) -> RunResult:
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the run did not end within {timeout} s")
        if self._result is None:
            raise (TrainerKilled if self._exit_code < 0 and not self._error else BackendError)(self._failure())
        return self._result

    def cancel(self) -> None:
        self._write("cancel")

    def close(self) -> None:
        """End the process whatever it does, and wait for it."""
        with contextlib.suppress(OSError, ValueError):
            if self._process.stdin:
                self._process.stdin.close()  # the trainer takes this as a cancellation
        if not self._ended.wait(CLOSE_TIMEOUT_S):
            self._process.kill()  # the sandbox dies with its parent
            self._ended.wait(CLOSE_TIMEOUT_S)

    def _write(self, line: str) -> None:
        assert self._process.stdin
        with contextlib.suppress(OSError, ValueError):  # it has ended: `result` tells how
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _read(self, errors: threading.Thread) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            with contextlib.suppress(ValueError, KeyError):
                self._take(json.loads(line))
        self._exit_code = self._process.wait()
        errors.join(1.0)
        for stream in (self._process.stdout, self._process.stderr, self._process.stdin):
            with contextlib.suppress(OSError, ValueError):
                stream.close() if stream else None
        self._ended.set()

    def _take(self, event: dict[str, Any]) -> None:
        kind = event.pop("event")
        if kind == "progress":
            self._progress = Progress(**event)
        elif kind == "result":
            self._result = RunResult(**event)
        elif kind == "error":
            self._error = event["message"]

    def _read_errors(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            self._stderr.append(line.rstrip())

    def _failure(self) -> str:
        if self._error:
            return self._error
        text = "\n".join(self._stderr)
        if "No module named 'torch'" in text or "No module named 'safetensors'" in text:
            return (
                "training needs PyTorch and safetensors, which are not installed for this Python. Install the PyTorch "
                "build for your CPU or GPU first (README, 'Install'), then `pip install 'nanogpt_env[train]'`"
            )
        return f"the trainer ended with exit code {self._exit_code} and no result\n{text}".strip()


class LocalBackend:
    """`sandbox` is one of `SANDBOXES`; 'auto', the first that works here, is decided once, so that no later trouble can
    move a candidate out of its sandbox. With `warm`, each run's processes are forked from ones that have loaded what
    they need, which bubblewrap allows for (docs/design/warm-starts.md); these start with the first run, or `prepare`.
    `cold_because` says why not. No candidate sees the `hidden` folders. Raises `ValueError` for an unknown sandbox."""

    def __init__(self, sandbox: str = "auto", warm: bool = False, hidden: Iterable[Path] = ()) -> None:
        if sandbox not in SANDBOXES:
            raise ValueError(f"sandbox must be one of {', '.join(SANDBOXES)}, not {sandbox!r}")
        self.sandbox, self.hidden = sandbox, tuple(hidden)
        self.cold_because = "" if warm else "warm starts were not asked for"
        if warm and (sandbox not in ("auto", "bubblewrap") or not sys.platform.startswith("linux")):
            self.cold_because = NEEDS
        self._runs: list[LocalRun] = []
        self._server: ForkServer | None = None
        self._restarts = 1
        self._closed = False
        self._lock = threading.Lock()

    def start(self, job: Job, share: bool = False) -> LocalRun:
        self.prepare()
        with self._lock:
            if self._closed:
                raise BackendError("the backend is closed")
            cold = job.gpu_ids or (isinstance(job, StepsJob) and job.ranks > 1)
            forked = None if cold else self._forked(job.track)
            run = LocalRun(forked or self._launched(job.track, job.gpu_ids), job)
            self._runs = [*(r for r in self._runs if not r.done()), run]
            return run

    def prepare(self) -> None:
        """Start what warm starts need."""
        with self._lock:
            if not self.cold_because and self._settle() != "bubblewrap":
                self.cold_because = NEEDS
            if not (self._server or self.cold_because or self._closed):
                self._server = ForkServer(self.hidden)

    def kind(self) -> str:
        """The sandbox that runs get, 'auto' decided."""
        with self._lock:
            return self._settle()

    def _settle(self) -> str:
        if self.sandbox == "auto":
            self.sandbox = sandbox_report("--auto")["auto"]
        return self.sandbox

    def exclusive(self, on_wait: Callable[[], None] = lambda: None) -> contextlib.AbstractContextManager[None]:
        """Nothing to wait for: runs take no turns here (`Queued` adds that)."""
        return contextlib.nullcontext()

    def _forked(self, track: str) -> Trainer | None:
        while self._server:
            trainer = self._server.fork(track)
            if trainer:
                return trainer
            reason = self._server.reason
            self._server.close()
            self._server = None
            if reason or not self._restarts:
                self.cold_because = reason or "the fork server died twice"
            else:  # it was killed, or its zygote
                self._restarts -= 1
                self._server = ForkServer(self.hidden)
        return None

    def _launched(self, track: str, gpus: tuple[str, ...]) -> Trainer:
        why = self.cold_because or "of several ranks, or on GPUs"
        return launch(track, self._settle(), self.hidden, f"cold start: {why}", gpus)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            runs, self._runs = self._runs, []
            server, self._server = self._server, None
        for run in runs:
            run.cancel()
        for run in runs:
            run.close()
        if server:
            server.close()


def sandbox_report(*options: str) -> dict[str, Any]:
    """What sandboxes this machine offers; see `gpu_backend/report.py`. Raises `BackendError`."""
    script = content_root() / "gpu_backend" / "report.py"
    try:
        done = subprocess.run(
            [sys.executable, str(script), *options], capture_output=True, text=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        raise BackendError("the sandbox check did not end within 60 s") from None
    if done.returncode:
        raise BackendError(f"the sandbox check failed: {done.stderr.strip()[-500:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report

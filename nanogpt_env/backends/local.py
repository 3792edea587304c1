"""Trains on this machine: one trainer process per run, which starts the sandbox."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nanogpt_env.content import cache_dir, content_root
from nanogpt_env.errors import BackendError
from nanogpt_env.types import Job, Progress, RunResult

SANDBOXES = ("auto", "bubblewrap", "plain")
CLOSE_TIMEOUT_S = 15.0
STDERR_LINES = 30


class LocalRun:
    """A trainer process. It is started before its job is known, so that a warm one can wait."""

    def __init__(self, track: str, sandbox: str, hidden: Iterable[Path] = ()) -> None:
        self.track = track
        trainer = content_root() / "gpu_backend" / "trainer.py"
        command = [sys.executable, str(trainer), "--track", track, "--sandbox", sandbox]
        for folder in (cache_dir(), *hidden):
            command += ["--hide", str(folder)]
        # PYTHON* variables of the caller must not change what the trainer imports
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",  # whatever the locale
                errors="replace",
                env=env | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C reaches us only; we end the trainer
            )
        except OSError as error:
            raise BackendError(f"cannot start the trainer: {error}") from None
        self._result: RunResult | None = None
        self._error = ""
        self._progress: Progress | None = None
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._ended = threading.Event()
        errors = threading.Thread(target=self._read_errors, daemon=True)
        errors.start()
        threading.Thread(target=self._read, args=(errors,), daemon=True).start()

    def begin(self, job: Job) -> None:
        self._write(job.model_dump_json())

    def progress(self) -> Progress | None:
        return self._progress

    def done(self) -> bool:
        return self._ended.is_set()

    def result(self, timeout: float | None = None) -> RunResult:
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the run did not end within {timeout} s")
        if self._result is None:
            raise BackendError(self._failure())
        return self._result

    def cancel(self) -> None:
        self._write("cancel")

    def close(self) -> None:
        """End the process whatever it does, and wait for it."""
        with contextlib.suppress(OSError, ValueError):
            if self._process.stdin:
                self._process.stdin.close()  # the trainer takes this as a cancellation
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the sandbox dies with its parent
            self._process.wait()
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
        self._process.wait()
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
        return f"the trainer ended with exit code {self._process.returncode} and no result\n{text}".strip()


class LocalBackend:
    """`sandbox` is 'auto', 'bubblewrap' or 'plain'; 'auto' is decided once, so that no later trouble can move a
    candidate out of its sandbox. With `warm`, the next trainer is started ahead, so that its imports do not delay
    the next run. No candidate sees the `hidden` folders. Raises `ValueError` for an unknown sandbox."""

    def __init__(self, sandbox: str = "auto", warm: bool = False, hidden: Iterable[Path] = ()) -> None:
        if sandbox not in SANDBOXES:
            raise ValueError(f"sandbox must be one of {', '.join(SANDBOXES)}, not {sandbox!r}")
        self.sandbox, self.warm, self.hidden = sandbox, warm, tuple(hidden)
        self._runs: list[LocalRun] = []
        self._spare: LocalRun | None = None
        self._lock = threading.Lock()

    def start(self, job: Job, share: bool = False) -> LocalRun:
        with self._lock:
            self._settle()
            run, self._spare = self._spare or LocalRun(job.track, self.sandbox, self.hidden), None
            if run.done() or run.track != job.track:  # a spare that died while it waited, or waits for other work
                run.close()
                run = LocalRun(job.track, self.sandbox, self.hidden)
            self._runs = [*(r for r in self._runs if not r.done()), run]
            run.begin(job)
            if self.warm:
                self._spare = LocalRun(job.track, self.sandbox, self.hidden)
            return run

    def kind(self) -> str:
        """The sandbox that runs get, 'auto' decided."""
        with self._lock:
            return self._settle()

    def _settle(self) -> str:
        if self.sandbox == "auto":
            self.sandbox = sandbox_report()["auto"]
        return self.sandbox

    def exclusive(self, on_wait: Callable[[], None] = lambda: None) -> contextlib.AbstractContextManager[None]:
        """Nothing to wait for: runs take no turns here (`Queued` adds that)."""
        return contextlib.nullcontext()

    def close(self) -> None:
        with self._lock:
            runs, self._runs = [*self._runs, *([self._spare] if self._spare else [])], []
            self._spare = None
        for run in runs:
            run.cancel()
        for run in runs:
            run.close()


def sandbox_report() -> dict[str, Any]:
    """What sandboxes this machine offers; see `gpu_backend/sandbox.py`."""
    script = content_root() / "gpu_backend" / "sandbox.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise BackendError(f"the sandbox check failed: {done.stderr.strip()[-500:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report

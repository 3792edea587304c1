"""A backend that trains identical runs once for all environments of a user on this host.

Identical: same job but for deadline and cores, same trainer, PyTorch, machine and kind of sandbox. Results lie in the
cache folder, at most `KEEP` of them. Verification never shares: its seeds are fresh each time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import secrets
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from nanogpt_env.backends import Backend, RunHandle
from nanogpt_env.backends.queued import POLL_S
from nanogpt_env.backends.threaded import ThreadedRun
from nanogpt_env.content import cache_dir, state_dir, trainer_code
from nanogpt_env.errors import BackendError
from nanogpt_env.locking import locked
from nanogpt_env.types import Job, RunResult

KEEP = 2000
SECRET_BYTES = 32


class SharedRun(ThreadedRun):
    """A run that is trained here, or was, or is being trained for another environment."""

    def __init__(self, start: Callable[[Job], RunHandle], job: Job, path: Path) -> None:
        super().__init__()
        self._start, self._job, self._path = start, job, path
        self.begin()

    def _obtain(self) -> RunResult:
        with locked(self._path.with_suffix(".lock"), self._cancelled.is_set):
            return self._kept() or self._train()

    def _kept(self) -> RunResult | None:
        with contextlib.suppress(OSError, ValueError):
            result = RunResult.model_validate_json(self._path.read_bytes())
            os.utime(self._path)  # in use: not the first to be thrown away
            if result.device_seconds <= self._job.limits.deadline_s * max(1, self._job.gpus):
                return result.model_copy(update={"shared": True})
        return None

    def _train(self) -> RunResult:
        result = self._follow(lambda: self._start(self._job))
        if result.completed:
            with contextlib.suppress(OSError):  # a full disk costs the sharing, not the run
                temporary = self._path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
                temporary.write_text(result.model_dump_json())
                temporary.replace(self._path)
        return result


class Shared:
    """`inner`, trained once for identical runs. `kind` tells the sandbox that runs get. Closing it closes `inner`."""

    def __init__(self, inner: Backend, kind: Callable[[], str]) -> None:
        self.inner, self.kind = inner, kind
        self.folder = cache_dir() / "runs"
        self._runs: list[SharedRun] = []
        self._lock = threading.Lock()

    def start(self, job: Job, share: bool = False) -> RunHandle:
        if not share:
            return self.inner.start(job)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise BackendError(f"cannot write {self.folder}: {error.strerror}; set NANOGPT_ENV_CACHE") from None
        _prune(self.folder)
        try:
            path = self.folder / f"{self._key(job)}.json"
        except OSError as error:
            raise BackendError(f"cannot read the corpus in {job.corpus}: {error.strerror}") from None
        with self._lock:
            run = SharedRun(self.inner.start, job, path)
            self._runs = [*(r for r in self._runs if not r.done()), run]
        return run

    def exclusive(self, on_wait: Callable[[], None] = lambda: None) -> AbstractContextManager[None]:
        return self.inner.exclusive(on_wait)

    def close(self) -> None:
        with self._lock:
            runs, self._runs = self._runs, []
        for run in runs:
            run.cancel()
        self.inner.close()
        for run in runs:
            with contextlib.suppress(BackendError, TimeoutError):
                run.result(POLL_S)

    def _key(self, job: Job) -> str:
        content = job.model_dump_json(exclude={"limits": {"deadline_s"}, "cores": True, "cache": True})
        content += job.track + self.kind() + platform.node() + platform.processor()
        manifest = (Path(job.corpus) / "manifest.json").read_bytes()
        return hashlib.sha256(content.encode() + manifest + _trainer()).hexdigest()


@functools.cache
def _trainer() -> bytes:
    """What losses depend on beside the job: the trainer's code and the libraries it runs on."""
    return trainer_code() + "".join(metadata.version(name) for name in ("torch", "numpy")).encode()


def _prune(folder: Path) -> None:
    """Throw away the results that were not used for longest."""
    used = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            used.append((path.stat().st_mtime, path))
    for _, path in sorted(used)[: max(0, len(used) - KEEP)]:
        path.unlink(missing_ok=True)
        path.with_suffix(".lock").unlink(missing_ok=True)


def host_secret() -> bytes:
    """Random bytes of this host and user, from which seeds that environments share are drawn. Raises `BackendError`."""
    path = state_dir() / "seed-secret"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists() or path.stat().st_size != SECRET_BYTES:
                path.touch(mode=0o600)
                path.write_bytes(secrets.token_bytes(SECRET_BYTES))
            return path.read_bytes()
    except OSError as error:
        raise BackendError(f"cannot write {path}: {error.strerror}; set NANOGPT_ENV_STATE") from None

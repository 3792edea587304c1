"""A lock between processes that can be waited for and given up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

from filelock import FileLock, Timeout

POLL_S = 0.2


@contextlib.contextmanager
def locked(path: Path, cancelled: Callable[[], bool]) -> Iterator[None]:
    """Hold the file's lock. Raises concurrent.futures' `CancelledError` if `cancelled` comes first."""
    lock = FileLock(path)
    while True:
        if cancelled():
            raise CancelledError(f"the wait for {path.name} was cancelled")
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=POLL_S)
            break
    try:
        yield
    finally:
        lock.release()

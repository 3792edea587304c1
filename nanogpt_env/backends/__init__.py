"""What executes a run. A backend trains one job at a time per handle and measures it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from nanogpt_env.types import Job, Progress, RunResult


class RunHandle(Protocol):
    """One run under way, or waiting for a slot."""

    def progress(self) -> Progress | None:
        """The latest report, or None before the first."""

    def done(self) -> bool: ...

    def result(self, timeout: float | None = None) -> RunResult:
        """Wait for the end. Raises `TimeoutError`, or `BackendError` if our side failed."""

    def cancel(self) -> None:
        """Ask for the end; `result` then tells what was used."""


class Backend(Protocol):
    """Raises `BackendError` for failures of its own; a candidate's failure is a `RunResult`."""

    def start(self, job: Job, share: bool = False) -> RunHandle:
        """At once; the run itself waits for a slot. With `share`, the result of an identical run that was trained on
        this host may stand for it; a backend need not."""

    def exclusive(self, on_wait: Callable[[], None] = lambda: None) -> AbstractContextManager[None]:
        """The device for timed runs: inside, runs that this thread starts are the only ones of this user on this host.
        Waits for others' runs to end, and calls `on_wait` a few times a second meanwhile, which may raise."""

    def close(self) -> None:
        """Cancel what runs and leave nothing behind."""

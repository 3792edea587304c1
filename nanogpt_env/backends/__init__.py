"""What executes a run. A backend trains one job at a time per handle and measures it."""

from __future__ import annotations

from typing import Protocol

from nanogpt_env.types import Job, Progress, RunResult


class RunHandle(Protocol):
    """One run under way."""

    def progress(self) -> Progress | None:
        """The latest report, or None before the first."""

    def done(self) -> bool: ...

    def result(self, timeout: float | None = None) -> RunResult:
        """Wait for the end. Raises `TimeoutError`, or `BackendError` if our side failed."""

    def cancel(self) -> None:
        """Ask for the end; `result` then tells what was used."""


class Backend(Protocol):
    """Raises `BackendError` for failures of its own; a candidate's failure is a `RunResult`."""

    def start(self, job: Job) -> RunHandle: ...

    def close(self) -> None:
        """Cancel what runs and leave nothing behind."""

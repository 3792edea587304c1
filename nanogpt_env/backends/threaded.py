"""A run that a thread obtains: after some wait, from another run."""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError

from nanogpt_env.backends import RunHandle
from nanogpt_env.errors import BackendError
from nanogpt_env.types import Progress, RunResult, SandboxInfo

NOT_STARTED = SandboxInfo(name="none", trusted=True, note="the run was not started")


class ThreadedRun(abc.ABC):
    """A `RunHandle`. Call `begin` when all that `_obtain` needs is there."""

    def __init__(self) -> None:
        self._run: RunHandle | None = None
        self._cancelled, self._ended = threading.Event(), threading.Event()
        self._result: RunResult | None = None
        self._error = ""
        self._lock = threading.Lock()  # between starting and cancelling

    @abc.abstractmethod
    def _obtain(self) -> RunResult:
        """Raises `CancelledError` if `_cancelled` is set before there is a run."""

    def begin(self) -> None:
        threading.Thread(target=self._work, daemon=True).start()

    def progress(self) -> Progress | None:
        return self._run.progress() if self._run else None

    def done(self) -> bool:
        return self._ended.is_set()

    def result(self, timeout: float | None = None) -> RunResult:
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the run did not end within {timeout} s")
        if self._result is None:
            raise BackendError(self._error)
        return self._result

    def cancel(self) -> None:
        with self._lock:
            self._cancelled.set()
            if self._run:
                self._run.cancel()

    def _follow(self, start: Callable[[], RunHandle]) -> RunResult:
        """Start a run and wait for its end."""
        if self._cancelled.is_set():
            raise CancelledError
        run = start()  # this may take long, so nobody waits for it; who cancels meanwhile is served below
        with self._lock:
            self._run = run
            if self._cancelled.is_set():
                run.cancel()
        return run.result()

    def _work(self) -> None:
        try:
            self._result = self._obtain()
        except CancelledError:
            detail = "the run was cancelled before it was started"
            self._result = RunResult(exit_reason="cancelled", detail=detail, sandbox=NOT_STARTED)
        except BackendError as error:
            self._error = str(error)
        except Exception as error:
            self._error = f"the run could not be followed: {error!r}"
        finally:
            self._ended.set()

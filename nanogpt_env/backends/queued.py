"""A backend whose runs wait for cores of this host, which all environments of a user share."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError

from nanogpt_env.backends import Backend, RunHandle
from nanogpt_env.errors import BackendError
from nanogpt_env.slots import Slots
from nanogpt_env.types import Job, Progress, RunResult, SandboxInfo

POLL_S = 0.2
NOT_STARTED = SandboxInfo(name="none", trusted=True, note="the run was not started")


class QueuedRun:
    """A run that starts once it has a core, and gives it back when it ends."""

    def __init__(self, start: Callable[[Job], RunHandle], job: Job, slots: Slots) -> None:
        self._run: RunHandle | None = None
        self._cancelled, self._ended = threading.Event(), threading.Event()
        self._result: RunResult | None = None
        self._error = ""
        self._lock = threading.Lock()  # between starting and cancelling
        threading.Thread(target=self._work, args=(start, job, slots), daemon=True).start()

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

    def _work(self, start: Callable[[Job], RunHandle], job: Job, slots: Slots) -> None:
        try:
            with slots.acquire(cancelled=self._cancelled.is_set) as slot:
                with self._lock:
                    if self._cancelled.is_set():
                        raise CancelledError
                    self._run = start(job.model_copy(update={"cores": (slot.core,)}))
                self._result = self._run.result()
        except CancelledError:
            detail = "the run was cancelled while it waited for a core"
            self._result = RunResult(exit_reason="cancelled", detail=detail, sandbox=NOT_STARTED)
        except BackendError as error:
            self._error = str(error)
        except Exception as error:
            self._error = f"the run could not be followed: {error!r}"
        finally:
            self._ended.set()


class Queued:
    """`inner` with `owner`'s turn at the cores of this host. Closing it closes `inner`."""

    def __init__(self, inner: Backend, owner: str) -> None:
        self.inner = inner
        self.slots = Slots(owner)
        self._runs: list[QueuedRun] = []
        self._session: tuple[int, tuple[int, ...]] | None = None
        """thread and cores of an exclusive session"""

    def start(self, job: Job) -> RunHandle:
        if self._session and self._session[0] == threading.get_ident():
            # the last core: what the system itself does is mostly done on the first
            return self.inner.start(job.model_copy(update={"cores": self._session[1][-1:]}))
        run = QueuedRun(self.inner.start, job, self.slots)
        self._runs = [*(r for r in self._runs if not r.done()), run]
        return run

    @contextlib.contextmanager
    def exclusive(self, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        told = time.monotonic()

        def waiting() -> bool:
            nonlocal told
            if time.monotonic() - told > POLL_S:
                told = time.monotonic()
                on_wait()
            return False

        slot = self.slots.acquire_all(cancelled=waiting)
        with slot:
            self._session = threading.get_ident(), slot.cores
            try:
                yield
            finally:
                self._session = None

    def close(self) -> None:
        for run in self._runs:
            run.cancel()
        self.inner.close()
        for run in self._runs:
            with contextlib.suppress(BackendError, TimeoutError):
                run.result(POLL_S)

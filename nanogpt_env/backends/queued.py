"""A backend whose runs wait for cores and GPUs of this host, which all environments of a user share."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from nanogpt_env.backends import Backend, RunHandle
from nanogpt_env.backends.threaded import ThreadedRun
from nanogpt_env.errors import BackendError, TrainerKilled
from nanogpt_env.gpus import Gpus, check_idle, states
from nanogpt_env.slots import Slots
from nanogpt_env.types import Job, RunResult, StepsJob

POLL_S = 0.2
RESUMPTIONS = 3
"""of a run whose trainer was killed, if its tier has it saved"""


class QueuedRun(ThreadedRun):
    """A run that starts once it has a core, and its GPUs, and gives them back when it ends."""

    def __init__(self, start: Callable[[Job], RunHandle], job: Job, slots: Slots | None, gpus: Gpus) -> None:
        """`slots`: None if the job has its cores."""
        super().__init__()
        self._start, self._job, self._slots, self._gpus = start, job, slots, gpus
        self.begin()

    def _obtain(self) -> RunResult:
        cancelled = self._cancelled.is_set
        with contextlib.ExitStack() as stack:
            job = self._job
            if self._slots:
                core = stack.enter_context(self._slots.acquire(cancelled=cancelled)).core
                job = job.model_copy(update={"cores": (core,)})
            held = stack.enter_context(self._gpus.acquire(job.gpus, cancelled))
            job = job.model_copy(update={"gpu_ids": held})
            before = states(held) if held else []
            result = self._followed(job)
            if held:
                check_idle(held)  # nobody came meanwhile
                result.hardware["gpu_states"] = {"before": before, "after": states(held)}
            return result

    def _followed(self, job: Job) -> RunResult:
        left = RESUMPTIONS if isinstance(job, StepsJob) and job.save_every else 0
        while True:
            try:
                return self._follow(lambda: self._start(job))
            except TrainerKilled:
                if not left:
                    raise
                left -= 1


class Queued:
    """`inner` with `owner`'s turn at the cores of this host. Closing it closes `inner`."""

    def __init__(self, inner: Backend, owner: str) -> None:
        self.inner = inner
        self.slots, self.gpus = Slots(owner), Gpus(owner)
        self._runs: list[QueuedRun] = []
        self._lock = threading.Lock()
        self._closed = False
        self._session: tuple[int, tuple[int, ...]] | None = None
        """thread and cores of an exclusive session"""

    def start(self, job: Job, share: bool = False) -> RunHandle:
        if self._session and self._session[0] == threading.get_ident():
            # the last core: what the system itself does is mostly done on the first
            job = job.model_copy(update={"cores": self._session[1][-1:]})
            return QueuedRun(self.inner.start, job, None, self.gpus) if job.gpus else self.inner.start(job)
        with self._lock:
            if self._closed:
                raise BackendError("the backend is closed")
            run = QueuedRun(self.inner.start, job, self.slots, self.gpus)
            self._runs = [*(r for r in self._runs if not r.done()), run]
        return run

    @contextlib.contextmanager
    def exclusive(self, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        told = time.monotonic()

        def waiting() -> bool:
            nonlocal told
            if self._closed:
                raise BackendError("the backend is closed")
            if time.monotonic() - told > POLL_S:
                told = time.monotonic()
                on_wait()
            return False

        with self.slots.acquire_all(cancelled=waiting) as slot:
            self._session = threading.get_ident(), slot.cores
            try:
                yield
            finally:
                self._session = None

    def close(self) -> None:
        with self._lock:
            self._closed = True
            runs, self._runs = self._runs, []
        for run in runs:
            run.cancel()
        self.inner.close()
        for run in runs:
            with contextlib.suppress(BackendError, TimeoutError):
                run.result(POLL_S)

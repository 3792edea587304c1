"""One episode behind a door: begun or gone on with in a folder, used by one thread; callers may come and go."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nanogpt_env.backends import RunHandle
from nanogpt_env.env import CHECKPOINT, Info, Speedrun
from nanogpt_env.errors import ActionError
from nanogpt_env.ledger import read_ledger
from nanogpt_env.types import Progress

PUBLIC_KINDS = frozenset(
    ["episode", "reserve", "charge", "run", "submit", "void", "opinion", "verdict", "reward", "action", "end"]
)
"""lines of a ledger that its agent may read: not those of reruns, which tell losses on the hidden shard"""
SEALED = ("tests", "judges")
"""fields of the first line that are the operator's"""


class Closed(BaseException):
    """The room is being closed while something runs in it; nobody catches it on the way."""


class Reply:
    """What an action did."""

    def __init__(self, text: str, info: Info) -> None:
        self.text, self.info = text, info

    @property
    def refused(self) -> bool:
        return bool(self.info.get("error"))


class Room:
    """`close` leaves the episode so that another process can go on with it."""

    def __init__(self, env: Speedrun, lock: FileLock) -> None:
        self.env, self._lock_file = env, lock
        self.greeting = ""
        self.over = ""
        self.waiting: tuple[str, RunHandle | None] = ("", None)
        self._closing = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="episode")
        self._lock = threading.Lock()
        self._submission: Future[Reply] | None = None
        self._last: Reply | None = None
        env.on_progress = self._progress

    @classmethod
    def open(cls, make: Callable[[Path], Speedrun], folder: Path) -> Room:
        """make: an environment whose episodes lie in the folder that it is given. Raises `ActionError` if the episode
        there has ended, and as `Speedrun.resume`."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = FileLock(folder / "lock", timeout=0)  # of two that come at once only one may begin
        try:
            lock.acquire()
        except Timeout:
            raise ActionError(f"another server has the episode in {folder}") from None
        with contextlib.ExitStack() as failed:
            failed.callback(lock.release)
            unended = unfinished(folder)
            room = cls(make(folder), lock)
            failed.callback(room.env.close)
            observation, _ = room._call(lambda: room.env.resume(unended) if unended else room.env.reset())
            failed.pop_all()
        room.greeting = observation["text"]
        return room

    def _call(self, work: Callable[[], Any]) -> Any:
        return self._worker.submit(work).result()

    # --- actions ---

    def do(self, action: dict[str, Any]) -> Reply:
        """One action that takes no time. Raises `ActionError` while a submission is being verified."""
        self._free()
        reply: Reply = self._call(lambda: self._step(action))
        return reply

    def submit(self, action: dict[str, Any]) -> None:
        """Begin a submission; `submission` has its reply."""
        with self._lock:
            self._free()
            self._last = None
            self._submission = self._worker.submit(self._step, action)

    def submission(self) -> Reply | None:
        """The reply to the last submission, once it is there. Raises `ActionError` if none was begun, and what it
        raised."""
        if self._submission is not None and self._submission.done():
            self._last, self._submission = self._submission.result(), None
        if self._submission is None and self._last is None:
            raise ActionError("nothing was submitted here; `status` has the verdicts of before")
        return self._last

    def running(self, handle: str) -> bool:
        """Raises `ActionError` for a run that there is not."""
        runs = self.env.episode.runs
        if handle not in runs:
            raise ActionError(f"no run {handle!r}; there are {', '.join(runs) or 'none yet'}")
        run = runs[handle]
        return run.result is None and not run.error and not run.process.done()

    def progress(self, handle: str) -> Progress | None:
        """Of a run, or of what the submission waits for if `handle` is empty."""
        process = self.env.episode.runs[handle].process if handle else self.waiting[1]
        return process.progress() if process else None

    @property
    def submitting(self) -> bool:
        return self._submission is not None and not self._submission.done()

    def _free(self) -> None:
        if self.over:
            raise ActionError(f"the episode is over: {self.over}")
        if self.submitting:
            raise ActionError(
                f"a submission is being verified ({self.waiting[0] or 'it begins'}); `result` waits for it"
            )

    def _step(self, action: dict[str, Any]) -> Reply:
        observation, _, terminated, truncated, info = self.env.step(action)
        self.waiting = ("", None)
        if terminated or truncated:
            self.over = self.env.episode.over
        return Reply(observation["text"], info)

    def _progress(self, what: str, handle: RunHandle | None) -> None:
        if self._closing:
            raise Closed
        self.waiting = (what, handle)

    # --- what may be read ---

    def ledger(self) -> list[dict[str, Any]]:
        """The agent's view of it."""
        lines, _ = read_ledger(self.env.episode.ledger.path)
        shown = [{key: value for key, value in line.items() if key != "seq"} for line in lines]
        return [{k: v for k, v in line.items() if k not in SEALED} for line in shown if line["kind"] in PUBLIC_KINDS]

    def log(self, handle: str) -> str:
        """What the candidate printed in a run. Raises `ActionError`."""
        self.running(handle)
        result = self.env.episode.runs[handle].result
        if result is None:
            raise ActionError(f"{handle} has no log yet")
        return result.log

    # --- the end ---

    def close(self) -> None:
        """Leave the episode: runs are cancelled and charged, a submission that is under way is void. Safe to call
        twice."""
        if self._closing:
            return
        self._closing = True
        if self._submission:
            self._submission.cancel()
        try:
            if not self.over:
                self._call(self.env.leave)
        finally:
            self._worker.shutdown()
            self.env.close()
            self._lock_file.release()


def unfinished(folder: Path) -> Path | None:
    """The episode in a folder, if there is one; the time since it was left counts. Raises `ActionError` if it has
    ended, or there are several: whoever could begin others would have any budget and any number of submissions."""
    found = list(folder.glob(f"*/{CHECKPOINT}"))
    if len(found) > 1:
        raise ActionError(f"{folder} has {len(found)} episodes; a server's has one")
    for checkpoint in found:
        lines, _ = read_ledger(checkpoint.with_name("ledger.jsonl"))
        if lines and lines[-1]["kind"] == "end":
            ended = f"the episode in {folder} has ended ({lines[-1]['reason']})"
            raise ActionError(f"{ended}; choose another --output, or name (--episodes)")
        os.utime(checkpoint.with_name("ledger.jsonl"))
        return checkpoint.parent
    return None

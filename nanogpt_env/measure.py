"""What calibrations of both tracks share: runs that are kept in the cache folder, so that an interrupted calibration
continues where it stopped; and the constants of the loss test."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import secrets
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nanogpt_env.backends import Backend
from nanogpt_env.content import cache_dir, trainer_code
from nanogpt_env.errors import TierError
from nanogpt_env.stats import SequentialTest, boundary_constant, predicted_power, upper_sd
from nanogpt_env.timing import order
from nanogpt_env.tracks import Tier
from nanogpt_env.types import Job, RunResult

BOUNDARY_PATHS = 40_000_000

Report = Callable[[str, int, int], None]
"""called with (what, done, total)"""


def silent(what: str, done: int, total: int) -> None:
    pass


class Runs:
    """Trains jobs on a backend, `workers` at a time, and remembers finished ones and sessions of pairs in two files.

    fresh: forget both; retime: forget the sessions. Raises `TierError` while another of this tier is open.
    """

    def __init__(
        self,
        tier: Tier,
        backend: Backend,
        workers: int,
        report: Report,
        fresh: bool,
        retime: bool = False,
        name: str = "",
    ) -> None:
        self.tier, self.backend, self.workers, self.report = tier, backend, workers, report
        self.path = cache_dir() / "calibration" / f"{name or tier.name}.jsonl"
        self.sessions = self.path.with_stem(f"{self.path.stem}-sessions")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._only = FileLock(self.path.with_suffix(".lock"))
        try:
            self._only.acquire(blocking=False)
        except Timeout:
            raise TierError(f"another calibration of tier {tier.name} is running") from None
        if fresh:
            self.path.unlink(missing_ok=True)
        if fresh or retime:
            self.sessions.unlink(missing_ok=True)
        self._lock = threading.Lock()
        self.last: RunResult | None = None

    def close(self) -> None:
        self._only.release()

    def get(self, what: str, job: Job, count: int) -> list[RunResult]:
        """`count` completed runs of `job`, each with a fresh seed. Raises `TierError` if one fails."""
        key = self._key(job)
        done = _kept(self.path, key)[:count]
        if done:
            self.last = done[-1]
        self.report(what, len(done), count)

        def train(_: int) -> RunResult:
            result = self._train(what, job)
            with self._lock:
                _keep(self.path, key, result)
                done.append(result)
                self.report(what, len(done), count)
            return result

        pool = ThreadPoolExecutor(self.workers)
        try:
            list(pool.map(train, range(count - len(done))))
        finally:
            pool.shutdown(cancel_futures=True, wait=False)
        return done

    def pairs(self, what: str, job: Job, start: Job, pairs: int, session: int) -> tuple[list[float], list[float]]:
        """Training seconds of `job` and of the start record's, from one session of pairs; the numbered session is run
        once and kept."""
        key = self._key(job, start, mark=f"{pairs} pairs, session {session}")
        total = 2 * pairs + 1
        kept = _kept(self.sessions, key)
        self.report(what, min(len(kept), total), total)
        if len(kept) < total:  # a session that was cut off is run anew
            kept = []
            with self.backend.exclusive():
                turns = [False, *(turn for pair in order(pairs) for turn in pair)]
                for done, turn in enumerate(turns, 1):
                    kept.append(self._train(what, job if turn else start))
                    self.report(what, done, total)
            for result in kept:
                _keep(self.sessions, key, result)
        ours = [bool(turn) for pair in order(pairs) for turn in pair]
        timed = list(zip(ours, (r.train_seconds for r in kept[-2 * pairs :]), strict=True))
        return [s for mine, s in timed if mine], [s for mine, s in timed if not mine]

    def _train(self, what: str, job: Job) -> RunResult:
        run = self.backend.start(job.model_copy(update={"seed": secrets.token_hex(16)}))
        try:
            result = run.result()
        except BaseException:
            run.cancel()
            raise
        if not result.completed:
            raise TierError(f"{what}: {result.exit_reason}: {result.detail}\n{result.log[-2000:]}")
        self.last = result
        return result

    def _key(self, *jobs: Job, mark: str = "") -> str:
        content = [job.model_dump_json(exclude={"seed", "cache", "corpus", "limits", "cores"}) for job in jobs]
        text = "".join([*content, mark, self.tier.manifest()])
        return hashlib.sha256(text.encode() + trainer_code()).hexdigest()  # losses of another trainer are not these


def _kept(path: Path, key: str) -> list[RunResult]:
    if not path.exists():
        return []
    kept = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # torn by a crash, and maybe written on after it
            line = json.loads(text)
            if line["key"] == key:
                kept.append(RunResult(**line["result"]))
    return kept


def _keep(path: Path, key: str, result: RunResult) -> None:
    slim = result.model_dump(exclude={"train_losses", "log"})
    with path.open("a") as file:
        file.write(json.dumps({"key": key, "result": slim}) + "\n")


def boundary_of(tier: Tier, report: Report = silent) -> tuple[float, float]:
    """(constant C of the sequential test, rounded up by two standard errors; its standard error)."""
    report("boundary", 0, 1)
    v = tier.table.verification
    constant, error = boundary_constant(tier.level(), v.n_min, v.n_max, paths=BOUNDARY_PATHS)
    report("boundary", 1, 1)
    return math.ceil((constant + 2 * error) * 1e4) / 1e4, error


def loss_test(tier: Tier, sigma: float, boundary: float) -> SequentialTest:
    v = tier.table.verification
    target = tier.table.training.target
    return SequentialTest.for_tier(target, sigma, tier.level(), v.n_min, v.n_max, boundary)


def sigma(noise: Iterable[tuple[float, int]]) -> float:
    """Upper 90 % confidence limit of the pooled sd, from (sd, n) of each record."""
    return upper_sd(noise)[1]


def power_table(test: SequentialTest, sds: list[float]) -> dict[str, Any]:
    """Power over margin in units of sigma, at the records' lowest and highest sd."""
    sigma = test.futility_sd
    margins = [round(0.25 * i, 2) for i in range(13)]
    return {
        "margins_in_sigma": margins,
        **{
            which: {"sd": sd, "power": [round(predicted_power(test, m * sigma, sd), 4) for m in margins]}
            for which, sd in (("lowest_sd", min(sds)), ("highest_sd", max(sds)))
        },
    }

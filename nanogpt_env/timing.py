"""Is the candidate faster than the reference? A paired test on seconds, and a simulator of it.

Both programs run `pairs` times in one session, in turn (`order`). With r = ln(t_candidate / t_reference)

    upper = mean(r) + t_{pairs-1}(1 - level) * max(sd(r), floor) / sqrt(pairs);   faster if upper < 0

What slows a whole session cancels in r. The level holds for independent Gaussian r of any sd, as the floor only raises
`upper`; `tests/test_timing.py` measures what drift, slow runs and repeated void sessions add to it. One session cannot
see that this host happens to favour the candidate today (interaction): that adds most.

Who runs the programs decides about crashed runs, and starts with a run that does not count, as a cold first run would
be the reference's. Everything here is a pure function of seconds; scipy is imported on first use.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def order(pairs: int) -> list[tuple[bool, bool]]:
    """Whether it is the candidate's turn in the first and second run of each pair.

    The reference begins. A linear drift cancels in every two pairs, and the candidate's own runs follow one of its
    runs as often as the reference's do, so that heat it leaves behind gains it nothing.
    """
    return [(bool(j % 2), not j % 2) for j in range(pairs)]


@dataclass(frozen=True)
class PairDecision:
    """What a session says; a void one says neither yes nor no and is to be repeated."""

    log_ratio: float
    """Mean of ln(t_candidate / t_reference); negative is faster."""
    sd: float
    """Sample sd of the log ratios, not floored."""
    upper: float
    """Upper confidence bound of the log ratio at 1 - level."""
    drift: float
    """Move of the reference's own times, in floors; see `reference_drift`."""
    faster: bool
    void: bool
    reason: str

    @property
    def ratio(self) -> float:
        """What the reference's value is multiplied by: exp(upper) if faster, otherwise 1."""
        return math.exp(self.upper) if self.faster else 1.0


@dataclass(frozen=True, kw_only=True)
class PairTest:
    """A one-sided paired t test on log seconds, with a floor under the sd. ValueError on a field out of its range."""

    pairs: int
    """Pairs of runs, fixed beforehand; at least 2, as one pair has no sample sd."""
    level: float
    """One-sided error of this one submission, that is alpha / K."""
    floor: float
    """Smallest sd of a pair's log ratio that is used: the calibrated one of tier and host, .015 for 1.5 %. The sd of
    a single run is smaller by sqrt(2)."""
    drift: float = 3.0
    """Largest move of the reference's own times, in floors; inf voids nothing. At 3, with 5 pairs, calibrated noise
    voids 1 session in 100,000 and twice that 1 in 60; a steady drift may be 6.75 floors from first to last run."""

    def __post_init__(self) -> None:
        _require(self.pairs >= 2, f"pairs must be at least 2, got {self.pairs}")
        _require(0 < self.level < 0.5, f"level must be in (0, 0.5), got {self.level}")
        _require(0 < self.floor < math.inf, f"floor must be finite and positive, got {self.floor}")
        _require(self.drift > 0, f"drift must be positive, got {self.drift}")

    @functools.cached_property
    def half_width(self) -> float:
        """Least distance from the mean up to `upper`: the part of a gain that is never paid, log scale."""
        quantile = -float(importlib.import_module("scipy.special").stdtrit(self.pairs - 1, self.level))
        return quantile * self.floor / math.sqrt(self.pairs)

    def decide(self, candidate_s: Sequence[float], reference_s: Sequence[float]) -> PairDecision:
        """The decision on the seconds of all pairs; ValueError unless they are `pairs` finite positive times each."""
        n = len(candidate_s), len(reference_s)
        _require(n == (self.pairs, self.pairs), f"need {self.pairs} times each, got {n[0]} candidate, {n[1]} reference")
        r, reference = _log_times(candidate_s, reference_s)
        upper, drift = float(self.bounds(r)), float(reference_drift(reference)) / self.floor
        mean, sd, void = float(r.mean()), float(r.std(ddof=1)), drift > self.drift
        reason = f"the log ratio is {mean:+.4f} (sd {sd:.4f}), at most {upper:+.4f} at level {self.level:g}"
        if void:
            reason = f"the reference's own times moved by {drift:.1f} floors, {self.drift:g} are allowed: repeat"
        return PairDecision(mean, sd, upper, drift, not void and upper < 0, void, reason)

    def bounds(self, r: FloatArray) -> FloatArray:
        """Upper bound of log ratios along the last axis."""
        return np.asarray(r.mean(axis=-1) + self.half_width * np.maximum(r.std(axis=-1, ddof=1) / self.floor, 1.0))

    def stop_line(self, k: int) -> float:
        """Mean log ratio of the first k < pairs pairs above which the session is not going to end in "faster".

        A yes needs a mean of all pairs below `-half_width` per floor of sd, and the mean of k lies above that of all
        by at most `sqrt((pairs - 1) * (1/k - 1/pairs))` sample sds. The line is the highest mean these two allow for
        sds of one to four floors; where it is negative larger sds only lower it, so that no yes at all is lost.
        """
        _require(1 <= k < self.pairs, f"need 1 to {self.pairs - 1} pairs, got {k}")
        line = self.floor * math.sqrt((self.pairs - 1) * (1 / k - 1 / self.pairs)) - self.half_width
        return max(line, 4 * line)

    def hopeless(self, candidate_s: Sequence[float], reference_s: Sequence[float]) -> bool:
        """Whether to stop after these first k < pairs pairs and say no. Not binding, as it never makes a yes."""
        k = len(candidate_s)
        _require(k == len(reference_s), f"need whole pairs, got {k} candidate, {len(reference_s)} reference times")
        return self.stop_line(k) < float(_log_times(candidate_s, reference_s)[0].mean())


def _log_times(candidate_s: Sequence[float], reference_s: Sequence[float]) -> tuple[FloatArray, FloatArray]:
    """Log ratios, and log reference times."""
    times = np.array([candidate_s, reference_s], dtype=np.float64)
    fine = (times > 0) & (times < math.inf)
    _require(bool(fine.all()), f"times must be finite and positive seconds, got {times[~fine].tolist()}")
    candidate, reference = np.log(times)
    return candidate - reference, reference


def reference_drift(log_reference: FloatArray) -> FloatArray:
    """Distance of the medians of the first and second half of log times, along the last axis.

    An odd middle time counts in both, so that with 5 pairs one slow run in each half moves little. Nothing of the
    candidate is alive in these turns, and with 5 pairs heat it leaves behind moves both medians alike.
    """
    half = (log_reference.shape[-1] + 1) // 2
    first, last = np.median(log_reference[..., :half], axis=-1), np.median(log_reference[..., -half:], axis=-1)
    return np.abs(np.asarray(last - first))


@dataclass(frozen=True)
class SessionRates:
    """Shares of simulated sessions, mean runs of both programs together, mean exp(upper) of the faster (or nan)."""

    faster: float
    void: float
    mean_runs: float
    paid_ratio: float

    @property
    def faster_in_the_end(self) -> float:
        """Share of "faster" if a void session is repeated until one is not; nan if all are void."""
        return self.faster / (1 - self.void) if self.void < 1 else math.nan


def simulate(
    test: PairTest,
    paths: int = 100_000,
    log_ratio: float = 0.0,
    run_sd: float = 0.0,
    session_sd: float = 0.0,
    drift_sd: float = 0.0,
    outlier_share: float = 0.0,
    outlier_size: float = 0.0,
    interaction_sd: float = 0.0,
    seed: int = 0,
    stop: bool = True,
) -> SessionRates:
    """`rates` of simulated sessions; sizes and sds are on the log scale. Raises ValueError on a negative sd.

    A run has noise `run_sd` and is slower by `outlier_size` with chance `outlier_share`. A session shifts all runs
    (`session_sd`), drifts steadily from first to last run (`drift_sd`), and shifts the candidate (`interaction_sd`).
    """
    _require(paths >= 1, f"paths must be at least 1, got {paths}")
    _require(min(run_sd, session_sd, drift_sd, interaction_sd) >= 0, "an sd must not be negative")
    rng = np.random.default_rng(seed)
    session, drift, interaction = rng.standard_normal((3, paths, 1))
    x = run_sd * rng.standard_normal((paths, 2 * test.pairs)) + session_sd * session
    x += drift_sd * drift * np.linspace(0.0, 1.0, 2 * test.pairs)
    x += outlier_size * (rng.random(x.shape) < outlier_share)
    turns = np.array(order(test.pairs)).ravel()
    return rates(test, x[:, turns] + log_ratio + interaction_sd * interaction, x[:, ~turns], stop)


def rates(test: PairTest, log_candidate: FloatArray, log_reference: FloatArray, stop: bool = True) -> SessionRates:
    """`test` on the log seconds (paths, pairs) of many sessions; with `stop`, hopeless ones end early, as a no."""
    r, k = log_candidate - log_reference, np.arange(1, test.pairs)
    above = np.cumsum(r[:, :-1], axis=1) / k > np.array([test.stop_line(int(n)) for n in k])
    running = ~np.logical_or.accumulate(above & stop, axis=1)
    upper = test.bounds(r)
    void = running[:, -1] & (reference_drift(log_reference) > test.drift * test.floor)
    faster = running[:, -1] & ~void & (upper < 0)
    paid = float(np.exp(upper[faster]).mean()) if faster.any() else math.nan
    return SessionRates(float(faster.mean()), float(void.mean()), 2 + 2 * float(running.sum(axis=1).mean()), paid)

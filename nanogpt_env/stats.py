"""Sequential verification of reruns: is the mean validation loss below the target?

Losses are in nats per token. `margin` is target minus mean loss, so a positive margin is good.
The test is a group-sequential one-sided t test with a Wang-Tsiatis boundary, a floor under the
sample sd, and a non-binding futility line. Its error argument, for independent Gaussian losses
of any mean at or above the target and any sd:

1. At mean = target the path of t statistics without the floor does not depend on the sd, so one
   Monte Carlo (`boundary_constant`) fixes the boundary for all of them.
2. The floor only shrinks a positive statistic.
3. A mean above the target lowers every statistic and leaves the sd as it is.
4. Futility only removes paths that might have been accepted, so it may be overridden.

Everything here is a pure function. scipy is imported on first use, because it is slow to import.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

Outcome = Literal["accept", "reject", "continue"]

_CHUNK = 100_000  # paths held at once by the calibration, about 50 MB


def _special() -> Any:
    return importlib.import_module("scipy.special")


def _normal_upper_tail(x: float) -> float:
    return 0.5 * math.erfc(x / math.sqrt(2.0))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_paths(sd: float, paths: int) -> None:
    _require(math.isfinite(sd) and sd > 0, f"sd must be finite and positive, got {sd}")
    _require(paths >= 1, f"paths must be at least 1, got {paths}")


@dataclass(frozen=True)
class Decision:
    """What the test says after a number of reruns."""

    outcome: Outcome
    n: int
    """Reruns that the decision rests on; later ones were not looked at."""
    statistic: float
    """t statistic at look `n` (the sd is floored); -inf if a loss was not finite."""
    threshold: float
    """What the statistic had to reach at look `n`; inf where the test cannot accept yet."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class SequentialTest:
    """A one-sided group-sequential t test of `mean loss < target`, one look after every rerun.

    Look n accepts if `n >= n_min` and `statistic >= threshold(n)`; otherwise it rejects if the
    futility line is crossed or `n == n_max`. Raises ValueError on a field out of its range.
    """

    target: float
    """Validation loss to beat, nats."""
    level: float
    """One-sided false-accept level of this one submission, that is alpha / K."""
    n_min: int
    """First look that can accept; at least 2, as one loss has no sample sd."""
    n_max: int
    """Last look; a rerun count that is never exceeded."""
    boundary: float
    """Constant C of the accept boundary, from `boundary_constant(level, n_min, n_max, shape)`."""
    sd_floor: float
    """Smallest sd used in the statistic, nats; stops lucky closeness of a few losses."""
    futility_delta: float
    """Margin (nats) that the futility line tests against a margin of zero."""
    futility_sd: float
    """Run-to-run sd assumed by the futility line, nats."""
    futility_beta: float = 0.07
    """Futility error: a likelihood ratio of `beta` against `futility_delta` ends the test."""
    shape: float = 0.25
    """Exponent of `n_max / n` in the boundary, 1/2 - Delta in the notation of Wang and Tsiatis:
    0 is Pocock's, 1/2 is O'Brien and Fleming's; at 1/4 it equals Delta."""

    def __post_init__(self) -> None:
        _require(math.isfinite(self.target), f"target must be finite, got {self.target}")
        _require_design(self.level, self.n_min, self.n_max, self.shape)
        for name in ("boundary", "sd_floor", "futility_delta", "futility_sd"):
            value = getattr(self, name)
            _require(
                math.isfinite(value) and value > 0,
                f"{name} must be finite and positive, got {value}",
            )
        _require(0 < self.futility_beta < 1, f"futility_beta must be in (0, 1), got {self.futility_beta}")
        # The last look alone already spends 1 - Phi(C), so a smaller C cannot keep the level.
        _require(
            _normal_upper_tail(self.boundary) <= self.level * (1 + 1e-9),
            f"boundary {self.boundary} is too small for level {self.level}; "
            "compute it with boundary_constant(level, n_min, n_max, shape)",
        )

    @classmethod
    def for_tier(
        cls,
        target: float,
        sigma: float,
        level: float,
        n_min: int,
        n_max: int,
        boundary: float,
    ) -> SequentialTest:
        """The design for a tier whose run-to-run sd is `sigma` nats.

        The design was tuned on human reruns at sigma .0013, with sd floor .0011, futility margin
        .0018 and futility sd .0013; all three keep their ratio to sigma.
        """
        _require(math.isfinite(sigma) and sigma > 0, f"sigma must be positive, got {sigma}")
        return cls(
            target=target,
            level=level,
            n_min=n_min,
            n_max=n_max,
            boundary=boundary,
            sd_floor=sigma * 11 / 13,
            futility_delta=sigma * 18 / 13,
            futility_sd=sigma,
        )

    def threshold(self, n: int) -> float:
        """What the statistic must reach at look n: the upper t quantile, n - 1 degrees of freedom,
        at `1 - Phi(C * (n_max / n) ** shape)`; inf before `n_min`. Raises ValueError if n is not
        in 1..n_max.
        """
        _require(1 <= n <= self.n_max, f"n must be in 1..{self.n_max}, got {n}")
        if n < self.n_min:
            return math.inf
        tail = _normal_upper_tail(self.boundary * (self.n_max / n) ** self.shape)
        return float(-_special().stdtrit(n - 1, tail))

    def futility_loss(self, n: int) -> float:
        """Mean loss (nats) at or above which look n rejects.

        Wald's line for margin 0 against `futility_delta` with known sd:
        `target - delta / 2 + sd ** 2 * ln(1 / beta) / (delta * n)`.
        """
        _require(n >= 1, f"n must be at least 1, got {n}")
        delta = self.futility_delta
        room = self.futility_sd**2 * math.log(1 / self.futility_beta) / delta
        return self.target - delta / 2 + room / n

    def statistic(self, losses: Sequence[float]) -> float:
        """`(target - mean) * sqrt(n) / max(sd, sd_floor)`; the sd of one loss counts as 0.

        -inf if a loss is not finite. Raises ValueError without losses.
        """
        _require(len(losses) > 0, "the statistic needs at least one loss")
        x = np.asarray(losses, dtype=np.float64)
        if not np.isfinite(x).all():
            return -math.inf
        sd = float(x.std(ddof=1)) if len(x) > 1 else 0.0
        return (self.target - float(x.mean())) * math.sqrt(len(x)) / max(sd, self.sd_floor)

    def decide(self, losses: Sequence[float]) -> Decision:
        """Replay the looks in order and stop at the first decision.

        Losses after a decision never matter. A crashed rerun is given as `inf`; any loss that is
        not finite rejects. "continue" asks for another rerun.
        """
        decision = Decision("continue", 0, -math.inf, math.inf, "no reruns yet")
        for n in range(1, min(len(losses), self.n_max) + 1):
            decision = self._look(losses[:n])
            if decision.outcome != "continue":
                break
        return decision

    def _look(self, losses: Sequence[float]) -> Decision:
        n = len(losses)
        statistic, threshold = self.statistic(losses), self.threshold(n)

        def decision(outcome: Outcome, reason: str) -> Decision:
            return Decision(outcome, n, statistic, threshold, reason)

        if not math.isfinite(losses[-1]):
            return decision("reject", f"rerun {n} has no finite loss")
        if statistic >= threshold:
            return decision("accept", f"t {statistic:.3f} reaches {threshold:.3f} at n = {n}")
        if float(np.mean(losses)) >= self.futility_loss(n):
            return decision("reject", f"futile: the mean loss is too high at n = {n}")
        if n == self.n_max:
            return decision("reject", f"t {statistic:.3f} is below {threshold:.3f} at the last look, n = {n}")
        return decision("continue", f"undecided at n = {n}")


def _require_design(level: float, n_min: int, n_max: int, shape: float) -> None:
    _require(0 < level < 0.5, f"level must be in (0, 0.5), got {level}")
    _require(2 <= n_min <= n_max, f"need 2 <= n_min <= n_max, got n_min {n_min}, n_max {n_max}")
    _require(0 <= shape <= 0.5, f"shape must be in [0, 0.5], got {shape}")


def _running_mean_and_sd(x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean and sample sd after each look; `x` and both results are (looks, paths).

    The sd after one look is 0. Sums of squares are safe only if x is centred to a few sds.
    """
    n = np.arange(1, len(x) + 1, dtype=np.float64)[:, None]
    mean = np.cumsum(x, axis=0)
    mean /= n
    squares = np.cumsum(x * x, axis=0)
    squares -= n * mean * mean
    squares /= np.maximum(n - 1, 1)
    np.maximum(squares, 0.0, out=squares)
    squares[0] = 0.0
    return mean, np.sqrt(squares, out=squares)


def boundary_constant(
    level: float,
    n_min: int,
    n_max: int,
    shape: float = 0.25,
    paths: int = 4_000_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Constant C at which the boundary is crossed with probability `level`, and its standard error.

    Monte Carlo of the t path at mean = target, without floor and futility. Look n of a path is
    crossed for every C up to `z_n / (n_max / n) ** shape`, where z_n is the normal quantile of
    the t statistic's tail; C is the upper `level` quantile of the largest of these. Round it up
    by two standard errors for a guarantee. 4 million paths take about two seconds and 100 MB.
    Raises ValueError on a design out of range or on fewer than 100 expected crossings.
    """
    _require_design(level, n_min, n_max, shape)
    _require(level * paths >= 100, f"level {level} needs at least {100 / level:.0f} paths, got {paths}")
    special = _special()
    # The last look alone crosses with probability 1 - Phi(C), so the answer is at least `lowest`,
    # and only the few looks that cross at `lowest` need their exact tail.
    lowest = float(-special.ndtri(level))
    looks = np.arange(n_min, n_max + 1)
    scale = (n_max / looks) ** shape
    cut = -special.stdtrit(looks - 1, special.ndtr(-lowest * scale))

    rng = np.random.default_rng(seed)
    crossings = []
    for start in range(0, paths, _CHUNK):
        z = rng.standard_normal((n_max, min(_CHUNK, paths - start)))
        mean, sd = _running_mean_and_sd(z)
        with np.errstate(divide="ignore"):
            t = mean[looks - 1] * np.sqrt(looks)[:, None] / sd[looks - 1]
        largest = np.full(z.shape[1], lowest)
        for i, n in enumerate(looks):
            hit = np.flatnonzero(t[i] > cut[i])
            constant = -special.ndtri(special.stdtr(n - 1, -t[i, hit])) / scale[i]
            largest[hit] = np.maximum(largest[hit], constant)
        crossings.append(largest[largest > lowest])
    ordered = np.sort(np.concatenate(crossings))[::-1]

    # An order statistic's error is the spread over one binomial sd of its rank.
    rank, spread = level * paths, math.sqrt(level * (1 - level) * paths)
    upper, middle, lower = (
        float(ordered[round(r)]) if r < len(ordered) - 0.5 else lowest for r in (rank - spread, rank, rank + spread)
    )
    return middle, (upper - lower) / 2


@dataclass(frozen=True)
class Simulation:
    """Operating characteristics measured on simulated submissions; rates are fractions."""

    paths: int
    accept_rate: float
    accept_se: float
    """Binomial standard error of `accept_rate`; 0 when no path or every path was accepted."""
    mean_n: float
    """Mean reruns until the decision."""
    mean_n_se: float
    mean_n_accepted: float
    """Mean reruns of the accepted paths; nan if there are none."""
    n_quantiles: tuple[int, int, int]
    """10 %, 50 % and 90 % quantile of the reruns."""

    @classmethod
    def of(cls, accepted: BoolArray, n: IntArray) -> Simulation:
        """Summarise decisions: for each path whether it was accepted, and its reruns."""
        rate = float(accepted.mean())
        q10, q50, q90 = (int(q) for q in np.quantile(n, [0.1, 0.5, 0.9], method="inverted_cdf"))
        return cls(
            paths=len(n),
            accept_rate=rate,
            accept_se=math.sqrt(rate * (1 - rate) / len(n)),
            mean_n=float(n.mean()),
            mean_n_se=float(n.std()) / math.sqrt(len(n)),
            mean_n_accepted=float(n[accepted].mean()) if accepted.any() else math.nan,
            n_quantiles=(q10, q50, q90),
        )


def decide_paths(test: SequentialTest, losses: FloatArray) -> tuple[BoolArray, IntArray]:
    """`test.decide` on many submissions at once: accepted or not, and reruns until the decision.

    `losses` has the shape (paths, n_max). Raises ValueError on another shape.
    """
    _require(
        losses.ndim == 2 and losses.shape[1] == test.n_max,
        f"losses must have the shape (paths, {test.n_max}), got {losses.shape}",
    )
    x = np.ascontiguousarray(losses.T)
    bad = ~np.isfinite(x)
    x = np.where(bad, test.target, x)
    # Centred on the first loss, so that sums of squares keep their digits.
    mean, sd = _running_mean_and_sd(x - x[0])
    mean += x[0]
    np.maximum(sd, test.sd_floor, out=sd)

    running = np.ones(x.shape[1], dtype=np.bool_)
    accepted = np.zeros(x.shape[1], dtype=np.bool_)
    reruns = np.zeros(x.shape[1], dtype=np.int64)
    for i in range(test.n_max):
        n = i + 1
        reruns += running
        running &= ~bad[i]
        if n >= test.n_min:
            statistic = (test.target - mean[i]) * math.sqrt(n) / sd[i]
            passed = running & (statistic >= test.threshold(n))
            accepted |= passed
            running &= ~passed
        running &= mean[i] < test.futility_loss(n)
    return accepted, reruns


def simulate(
    test: SequentialTest,
    margin: float,
    sd: float,
    paths: int = 100_000,
    seed: int = 0,
    margin_sd: float = 0.0,
) -> Simulation:
    """Acceptance and rerun count of a submission with Gaussian losses of mean `target - margin`.

    `margin`, `sd` and `margin_sd` are in nats. With `margin_sd` each path draws its own margin
    from N(margin, margin_sd ** 2): the power predicted from an uncertain estimate of the margin.
    Needs about 600 bytes a path. Raises ValueError unless sd > 0 and margin_sd >= 0.
    """
    _require_paths(sd, paths)
    _require(math.isfinite(margin), f"margin must be finite, got {margin}")
    _require(margin_sd >= 0, f"margin_sd must not be negative, got {margin_sd}")
    rng = np.random.default_rng(seed)
    losses = rng.standard_normal((test.n_max, paths))
    losses *= sd
    losses += test.target - margin
    if margin_sd > 0:
        losses -= margin_sd * rng.standard_normal(paths)
    return Simulation.of(*decide_paths(test, losses.T))


@functools.lru_cache(maxsize=8)
def critical_margins(test: SequentialTest, sd: float, paths: int = 200_000, seed: int = 0) -> FloatArray:
    """The smallest accepted margin (nats) of each simulated noise path, in rising order.

    A larger margin raises every statistic and lowers every mean loss, so a path that is accepted
    at one margin is accepted at every larger one. The share of values up to m is therefore the
    acceptance power at margin m, for all m at once. The array is cached and read-only.
    """
    _require_paths(sd, paths)
    z = np.random.default_rng(seed).standard_normal((test.n_max, paths))
    noise, spread = _running_mean_and_sd(z)
    noise *= sd  # how far the mean loss lies above its expectation
    spread *= sd
    np.maximum(spread, test.sd_floor, out=spread)

    critical = np.full(paths, np.inf)
    alive = np.full(paths, -np.inf)  # margin needed to outlive the futility looks so far
    for i in range(test.n_max):
        n = i + 1
        if n >= test.n_min:
            needed = test.threshold(n) / math.sqrt(n) * spread[i] + noise[i]
            np.minimum(critical, np.maximum(needed, alive), out=critical)
        np.maximum(alive, noise[i] + (test.target - test.futility_loss(n)), out=alive)
    critical.sort()
    critical.flags.writeable = False
    return critical


def predicted_power(
    test: SequentialTest,
    margin: float,
    sd: float,
    runs: float = math.inf,
    paths: int = 200_000,
    seed: int = 0,
) -> float:
    """Probability of acceptance if the margin (nats) was estimated by the mean of `runs` runs.

    The true margin is taken as N(margin, sd ** 2 / runs), a flat prior with the sd known;
    `runs = inf` is the ordinary power. Raises ValueError unless sd > 0 and runs > 0.
    """
    _require(runs > 0, f"runs must be positive, got {runs}")
    critical = critical_margins(test, sd, paths, seed)
    if math.isinf(runs):
        return float(np.searchsorted(critical, margin, side="right")) / paths
    return float(_special().ndtr((margin - critical) * (math.sqrt(runs) / sd)).mean())


def margin_for_power(test: SequentialTest, sd: float, power: float = 0.9, paths: int = 200_000, seed: int = 0) -> float:
    """Smallest margin (nats) that is accepted with probability `power`, for Gaussian noise.

    A quantile of `critical_margins`, exact for these paths. Raises ValueError unless
    0 < power < 1 and sd > 0.
    """
    _require(0 < power < 1, f"power must be in (0, 1), got {power}")
    critical = critical_margins(test, sd, paths, seed)
    return float(critical[math.ceil(power * paths) - 1])


def runs_to_tell(
    test: SequentialTest,
    margin: float,
    sd: float,
    power: float = 0.9,
    max_runs: int = 64,
    paths: int = 100_000,
    seed: int = 0,
) -> int | None:
    """Fewest own runs after which an estimated margin (nats) predicts acceptance with `power`.

    None if the margin would not reach that power even if it were known exactly, or not within
    `max_runs`. See `predicted_power` for what is assumed of the estimate.
    """
    _require(0 < power < 1, f"power must be in (0, 1), got {power}")
    if predicted_power(test, margin, sd, paths=paths, seed=seed) < power:
        return None
    for runs in range(1, max_runs + 1):
        if predicted_power(test, margin, sd, runs, paths, seed) >= power:
            return runs
    return None


def z_rule(losses: Sequence[float], target: float, threshold: float = 0.004) -> tuple[float, bool]:
    """The optimization track's published rule: `(target - mean) * sqrt(n) >= threshold`.

    Returns the statistic (nats) and whether it passes; at sd .0013 the threshold is 3.08 sigma,
    p = .00105. A shortfall below 1e-9 counts as rounding, since the rule's own examples (n = 1
    at 3.276, n = 4 at 3.278) miss .004 by float error. It holds for an n fixed beforehand and a
    known sd; peeking or noisier runs break it. A loss that is not finite gives -inf and fails.
    Raises ValueError without losses.
    """
    _require(len(losses) > 0, "the z rule needs at least one loss")
    if not all(map(math.isfinite, losses)):
        return -math.inf, False
    mean = math.fsum(losses) / len(losses)
    statistic = (target - mean) * math.sqrt(len(losses))
    return statistic, statistic >= threshold - 1e-9


def upper_sd(sds_and_ns: Iterable[tuple[float, int]], confidence: float = 0.9) -> tuple[float, float]:
    """Pooled sd of several groups of runs and its upper confidence limit, in the sds' unit.

    Each group gives its sample sd (ddof 1) and its n. The limit is
    `pooled * sqrt(df / q)` with q the lower 1 - confidence quantile of chi-square at the pooled
    degrees of freedom: Gaussian noise of one common sd. Raises ValueError without a group of two.
    """
    groups = list(sds_and_ns)
    _require(0 < confidence < 1, f"confidence must be in (0, 1), got {confidence}")
    for sd, n in groups:
        _require(
            math.isfinite(sd) and sd >= 0 and n >= 1,
            f"a group needs a finite sd >= 0 and n >= 1, got sd {sd}, n {n}",
        )
    # A single run has no sample sd; whatever is written there has no weight.
    df = sum(n - 1 for _, n in groups)
    _require(df > 0, "the pooled sd needs at least one group of two runs")
    pooled = math.sqrt(sum((n - 1) * sd**2 for sd, n in groups) / df)
    return pooled, pooled * math.sqrt(df / float(_special().chdtri(df, confidence)))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a mean, by Student's t. Raises `ValueError` for fewer than two values."""
    _require(len(values) > 1 and 0 < confidence < 1, "need two values or more and a confidence between 0 and 1")
    column = np.asarray(values, dtype=np.float64)
    half = float(
        _special().stdtrit(len(column) - 1, (1 + confidence) / 2) * column.std(ddof=1) / math.sqrt(len(column))
    )
    return float(column.mean()) - half, float(column.mean()) + half

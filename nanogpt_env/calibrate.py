"""Measure a tier: its records' steps to the target, the values of start and anchor, noise, boundary, power.

docs/tiers.md ("Calibration") describes the procedure. Finished runs are kept in the cache folder, so that
an interrupted calibration continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_env.backends import Backend
from nanogpt_env.content import cache_dir
from nanogpt_env.errors import TierError
from nanogpt_env.stats import (
    SequentialTest,
    boundary_constant,
    margin_for_power,
    predicted_power,
    upper_sd,
)
from nanogpt_env.tiers import Calibration, HumanRecord, RecordCalibration, Tier
from nanogpt_env.types import Job, RunResult

# Where a record's run is evaluated on the whole hidden shard, as shares of its horizon.
GRID = (0.70, 0.78, 0.84, 0.88, 0.91, 0.94, 0.96, 0.98)
POWER, SURE = 0.9, 0.9995
BOUNDARY_PATHS = 40_000_000
# A value further than this from the claim that was rerun is measured again at the new claim.
SETTLED = 0.01
MAX_PASSES = 3

Report = Callable[[str, int, int], None]
"""called with (what, done, total)"""


@dataclass(frozen=True)
class Curve:
    """Hidden loss of one record at `steps`: `losses` has shape (seeds, len(steps))."""

    steps: np.ndarray[Any, np.dtype[np.float64]]
    losses: np.ndarray[Any, np.dtype[np.float64]]

    def mean_at(self, step: float) -> float:
        return float(np.interp(step, self.steps, self.losses.mean(axis=0)))

    def slope_at(self, step: float) -> float:
        """Nats per step by which the mean loss falls around `step`, over the neighbouring grid points."""
        i = int(np.clip(np.searchsorted(self.steps, step), 1, len(self.steps) - 1))
        low, high = max(0, i - 2), min(len(self.steps) - 1, i + 1)
        mean = self.losses.mean(axis=0)
        return float((mean[low] - mean[high]) / (self.steps[high] - self.steps[low]))

    def crossings(self, target: float) -> list[float]:
        """For each seed, the first step at which the loss is at the target, interpolated."""
        return [_crossing(self.steps, row, target) for row in self.losses]


class Runs:
    """Trains jobs on a backend, `workers` at a time, and remembers finished ones in a file."""

    def __init__(self, tier: Tier, backend: Backend, workers: int, report: Report, fresh: bool) -> None:
        self.tier, self.backend, self.workers, self.report = tier, backend, workers, report
        self.path = cache_dir() / "calibration" / f"{tier.name}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            self.path.unlink(missing_ok=True)
        self._lock = threading.Lock()
        self.last: RunResult | None = None

    def get(self, what: str, job: Job, count: int) -> list[RunResult]:
        """`count` completed runs of `job`, each with a fresh seed. Raises `TierError` if one fails."""
        key = hashlib.sha256(job.model_dump_json(exclude={"seed", "cache", "corpus", "limits"}).encode())
        done = self._kept(key.hexdigest())[:count]
        if done:
            self.last = done[-1]
        self.report(what, len(done), count)

        def train(_: int) -> RunResult:
            result = self.backend.start(job.model_copy(update={"seed": secrets.token_hex(16)})).result()
            if not result.completed:
                raise TierError(f"{what}: {result.exit_reason}: {result.detail}\n{result.log[-2000:]}")
            with self._lock:
                self._keep(key.hexdigest(), result)
                done.append(result)
                self.last = result
                self.report(what, len(done), count)
            return result

        pool = ThreadPoolExecutor(self.workers)
        try:
            list(pool.map(train, range(count - len(done))))
        finally:
            pool.shutdown(cancel_futures=True, wait=False)
        return done

    def _kept(self, key: str) -> list[RunResult]:
        if not self.path.exists():
            return []
        lines = (json.loads(x) for x in self.path.read_text().splitlines() if x.endswith("}"))
        return [RunResult(**line["result"]) for line in lines if line["key"] == key]

    def _keep(self, key: str, result: RunResult) -> None:
        slim = result.model_dump(exclude={"train_losses", "log"})
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, "result": slim}) + "\n")


def calibrate(
    tier: Tier,
    backend: Backend,
    *,
    seeds: int = 5,
    reruns: int = 20,
    value: Iterable[str] = (),
    workers: int = 1,
    fresh: bool = False,
    report: Report = lambda what, done, total: None,
) -> Calibration:
    """Run everything and return the calibration. Raises `TierError` if the tier cannot be calibrated as it
    is (a record misses the target within its horizon, or fails)."""
    runs = Runs(tier, backend, workers, report, fresh)
    curves = {r.name: _curve(tier, r, runs, seeds) for r in tier.records.values()}
    target = tier.table.training.target
    noise: dict[str, tuple[float, int]] = {}
    for name, curve in curves.items():
        at = float(np.mean(curve.crossings(target)))
        losses = [float(np.interp(at, curve.steps, row)) for row in curve.losses]
        noise[name] = (float(np.std(losses, ddof=1)), len(losses))
    boundary, boundary_error = boundary_of(tier, report)
    sigma = upper_sd(noise.values())[1]
    valued: dict[str, dict[str, Any]] = {}
    claims: dict[str, int] = {}
    names = list(dict.fromkeys((tier.table.reward.start, tier.table.reward.anchor, *value)))
    for _ in range(2):  # the reruns of the values refine sigma, and sigma the values
        test = _test(tier, sigma, boundary)
        for n in names:
            claim = claims.get(n) or _claim_for(tier, test, tier.record(n), curves[n], noise[n][0])
            valued[n] = _value(tier, test, tier.record(n), curves[n], claim, runs, reruns)
            claims[n] = valued[n]["claim"]
        known = {n: (v["loss_sd"], v["n"]) for n, v in valued.items()}
        sigma = upper_sd({**noise, **known}.values())[1]
    test = _test(tier, sigma, boundary)
    offset = _shard_offset(tier, valued)
    records = {
        name: _record(test, name, curve, {**noise, **known}[name][0], valued.get(name), tier)
        for name, curve in curves.items()
    }
    last = runs.last
    return Calibration(
        fingerprint=tier.fingerprint(),
        sigma=sigma,
        boundary=boundary,
        boundary_level=tier.level(),
        records=records,
        power=_power(test, [r.loss_sd for r in records.values()]),
        evidence={
            "command": f"nanogpt-env tiers calibrate {tier.name} --seeds {seeds} --reruns {reruns}",
            "boundary_error": boundary_error,
            "curves": {
                n: {"steps": c.steps.tolist(), "hidden_losses": np.round(c.losses, 6).tolist()}
                for n, c in curves.items()
            },
            "values": valued,
            "versions": last.versions if last else {},
            "hardware": last.hardware if last else {},
            "sandbox": last.sandbox.model_dump() if last else {},
        },
        **offset,
    )


def boundary_of(tier: Tier, report: Report = lambda what, done, total: None) -> tuple[float, float]:
    """(constant C of the sequential test, rounded up by two standard errors; its standard error)."""
    report("boundary", 0, 1)
    v = tier.table.verification
    constant, error = boundary_constant(tier.level(), v.n_min, v.n_max, paths=BOUNDARY_PATHS)
    report("boundary", 1, 1)
    return math.ceil((constant + 2 * error) * 1e4) / 1e4, error


def write_calibration(path: Path, calibration: Calibration) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(calibration.model_dump(), indent=1) + "\n")
    temporary.replace(path)


def _curve(tier: Tier, record: HumanRecord, runs: Runs, seeds: int) -> Curve:
    data, horizon = tier.table.data, record.horizon
    job = tier.job(record.source, horizon, horizon, "", (data.hidden,))
    points = tuple(round(share * horizon) for share in GRID)
    job = job.model_copy(update={"points": points, "point_tokens": 1 << 30})
    results = runs.get(f"{record.name}: curve", job, seeds)
    curve = Curve(
        np.array([step for step, _ in results[0].val_points], dtype=np.float64),
        np.array([[loss for _, loss in r.val_points] for r in results]),
    )
    target = tier.table.training.target
    if not (curve.losses[:, -1] <= target).all():
        worst = curve.losses[:, -1].max()
        raise TierError(
            f"record {record.name} misses the target {target:g} within its horizon of {horizon} steps "
            f"(loss {worst:.4f}): lengthen the horizon in its record.toml or raise the target"
        )
    return curve


def _crossing(steps: Any, losses: Any, target: float) -> float:
    below = int(np.argmax(losses <= target))
    if below == 0:
        raise TierError(
            f"a record is below the target already at step {steps[0]:g}: shorten its horizon or lower the target"
        )
    fraction = (losses[below - 1] - target) / (losses[below - 1] - losses[below])
    return float(steps[below - 1] + fraction * (steps[below] - steps[below - 1]))


def _test(tier: Tier, sigma: float, boundary: float) -> SequentialTest:
    v = tier.table.verification
    target = tier.table.training.target
    return SequentialTest.for_tier(target, sigma, tier.level(), v.n_min, v.n_max, boundary)


def _value(
    tier: Tier, test: SequentialTest, record: HumanRecord, curve: Curve, claim: int, runs: Runs, reruns: int
) -> dict[str, Any]:
    """The claim that verification accepts with power 0.9, from reruns at (about) that claim."""
    data, target = tier.table.data, tier.table.training.target
    for passes in range(1, MAX_PASSES + 1):
        job = tier.job(record.source, claim, record.horizon, "", (data.hidden, data.public))
        results = runs.get(f"{record.name}: value at step {claim}", job, reruns)
        hidden = np.array([r.val_losses[data.hidden] for r in results])
        public = np.array([r.val_losses[data.public] for r in results])
        sd = float(hidden.std(ddof=1))
        slope = curve.slope_at(claim)
        needed = margin_for_power(test, sd, POWER)
        value = claim + (needed - (target - float(hidden.mean()))) / slope
        if abs(value - claim) <= max(1.0, SETTLED * claim) or passes == MAX_PASSES:
            break
        claim = min(round(value), record.horizon)
    # two sources of error: the mean, and the sd through the margin that it asks for
    up, down = (margin_for_power(test, sd * f, POWER) for f in (1 + 0.05, 1 - 0.05))
    sd_error = sd / math.sqrt(2 * (reruns - 1))
    error = math.hypot(sd / math.sqrt(reruns), (up - down) / (0.1 * sd) * sd_error) / slope
    return {
        "claim": claim,
        "n": len(results),
        "value": value,
        "error": error,
        "loss_mean": float(hidden.mean()),
        "loss_sd": sd,
        "slope": slope,
        "margin_for_power": needed,
        "hidden_losses": np.round(hidden, 6).tolist(),
        "public_losses": np.round(public, 6).tolist(),
    }


def _claim_for(tier: Tier, test: SequentialTest, record: HumanRecord, curve: Curve, sd: float) -> int:
    """A first guess, from the curve's few seeds."""
    loss = tier.table.training.target - margin_for_power(test, sd, POWER)
    mean = curve.losses.mean(axis=0)
    if mean[-1] > loss:
        raise TierError(
            f"record {record.name} ends at a mean loss of {mean[-1]:.4f}, but a claim needs {loss:.4f} "
            f"within its horizon of {record.horizon} steps: lengthen the horizon in its record.toml"
        )
    return math.ceil(_crossing(curve.steps, mean, loss))


def _shard_offset(tier: Tier, valued: dict[str, dict[str, Any]]) -> dict[str, float]:
    start, anchor = (valued[n] for n in (tier.table.reward.start, tier.table.reward.anchor))
    per_record = [np.subtract(v["public_losses"], v["hidden_losses"]) for v in (start, anchor)]
    means = [float(d.mean()) for d in per_record]
    within = [float(d.var(ddof=1)) for d in per_record]
    errors = [w / len(d) for w, d in zip(within, per_record, strict=True)]
    return {
        "shard_offset": sum(means) / 2,
        "shard_offset_error": math.sqrt(sum(errors)) / 2,
        "shard_offset_sd": math.sqrt(sum(within) / 2),
    }


def _record(
    test: SequentialTest, name: str, curve: Curve, sd: float, value: dict[str, Any] | None, tier: Tier
) -> RecordCalibration:
    target = tier.table.training.target
    crossings = curve.crossings(target)
    # with a value: its reruns correct the few curves' mean at the claim
    shift = value["loss_mean"] - curve.mean_at(value["claim"]) if value else 0.0
    runs = value["n"] if value else len(crossings)
    horizon = int(curve.steps[-1])
    steps = range(int(curve.steps[0]), horizon + 1)
    sure = (
        k for k in steps
        if predicted_power(test, target - curve.mean_at(k) - shift, sd, runs) >= SURE
    )  # fmt: skip
    return RecordCalibration(
        steps_mean=float(np.mean(crossings)),
        steps_sd=float(np.std(crossings, ddof=1)),
        steps_n=len(crossings),
        value=round(value["value"], 1) if value else None,
        value_error=round(value["error"], 2) if value else None,
        value_n=value["n"] if value else 0,
        claim=next(sure, horizon),
        loss_sd=sd,
    )


def _power(test: SequentialTest, sds: list[float]) -> dict[str, Any]:
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

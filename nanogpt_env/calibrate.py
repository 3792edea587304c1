"""Measure a tier: its records' steps to the target, the values of start and anchor, noise, boundary, power.

docs/tiers.md ("Calibration") describes the procedure. Finished runs are kept in the cache folder, so that
an interrupted calibration continues where it stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
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
from nanogpt_env.content import cache_dir, content_root
from nanogpt_env.errors import TierError
from nanogpt_env.stats import (
    SequentialTest,
    boundary_constant,
    margin_for_power,
    predicted_power,
    upper_sd,
)
from nanogpt_env.tables import Calibration, HumanRecord, RecordCalibration
from nanogpt_env.tiers import Tier
from nanogpt_env.types import RunResult, StepsJob

# Where a record's run is evaluated on the whole hidden shard, as shares of its horizon.
GRID = (0.70, 0.78, 0.84, 0.88, 0.91, 0.94, 0.96, 0.98)
POWER, SURE = 0.9, 0.9995
BOUNDARY_PATHS = 40_000_000
# A claim for demonstrations has this many standard errors to spare, for what a few seeds get wrong.
SLACK = 1.7
# A value further than two standard errors from the claim that was rerun is measured again at the new claim.
MAX_PASSES = 3
# Further than this share of the claim, reruns say nothing about a value.
FAR = 0.05

Report = Callable[[str, int, int], None]
"""called with (what, done, total)"""


def _silent(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Curve:
    """Hidden loss of one record at `steps`: `losses` has shape (seeds, len(steps))."""

    steps: np.ndarray[Any, np.dtype[np.float64]]
    losses: np.ndarray[Any, np.dtype[np.float64]]

    def mean_at(self, step: float) -> float:
        return float(np.interp(step, self.steps, self.losses.mean(axis=0)))

    def slope_at(self, step: float) -> float:
        """Nats per step by which the mean loss falls at `step`: a parabola through the whole curve, since
        neighbouring points of a few seeds say little where the loss falls slowly."""
        parabola = np.polyfit(self.steps - step, self.losses.mean(axis=0), 2)
        return -float(parabola[1])

    def crossings(self, target: float) -> list[float]:
        """For each seed, the first step at which the loss is at the target, interpolated."""
        return [_crossing(self.steps, row, target) for row in self.losses]


@dataclass(frozen=True)
class Reruns:
    """Losses of one record's reruns, each stopped at its claim; all of shape (n,). A second pass at a better
    claim adds to the first."""

    claims: np.ndarray[Any, np.dtype[np.float64]]
    hidden: np.ndarray[Any, np.dtype[np.float64]]
    public: np.ndarray[Any, np.dtype[np.float64]]

    @property
    def claim(self) -> int:
        """Of the last pass."""
        return int(self.claims[-1])

    def at_claim(self, curve: Curve) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Hidden losses as they would be at `claim`, by the curve's slope."""
        return self.hidden + curve.slope_at(self.claim) * (self.claims - self.claim)

    def plus(self, claim: int, hidden: list[float], public: list[float]) -> Reruns:
        return Reruns(
            np.append(self.claims, [claim] * len(hidden)),
            np.append(self.hidden, hidden),
            np.append(self.public, public),
        )


class Runs:
    """Trains jobs on a backend, `workers` at a time, and remembers finished ones in a file."""

    def __init__(self, tier: Tier, backend: Backend, workers: int, report: Report, fresh: bool) -> None:
        self.tier, self.backend, self.workers, self.report = tier, backend, workers, report
        self.path = cache_dir() / "calibration" / f"{tier.name}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock_file = self.path.with_suffix(".lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise TierError(f"another calibration of tier {tier.name} is running") from None
        if fresh:
            self.path.unlink(missing_ok=True)
        # losses of another trainer are not these
        self.trainer = b"".join(path.read_bytes() for path in sorted((content_root() / "gpu_backend").glob("*.py")))
        self._lock = threading.Lock()
        self.last: RunResult | None = None

    def close(self) -> None:
        self._lock_file.close()

    def get(self, what: str, job: StepsJob, count: int) -> list[RunResult]:
        """`count` completed runs of `job`, each with a fresh seed. Raises `TierError` if one fails."""
        content = job.model_dump_json(exclude={"seed", "cache", "corpus", "limits"}) + self.tier.manifest()
        key = hashlib.sha256(content.encode() + self.trainer).hexdigest()
        done = self._kept(key)[:count]
        if done:
            self.last = done[-1]
        self.report(what, len(done), count)

        def train(_: int) -> RunResult:
            result = self.backend.start(job.model_copy(update={"seed": secrets.token_hex(16)})).result()
            if not result.completed:
                raise TierError(f"{what}: {result.exit_reason}: {result.detail}\n{result.log[-2000:]}")
            with self._lock:
                self._keep(key, result)
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
        kept = []
        for text in self.path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # torn by a crash, and maybe written on after it
                line = json.loads(text)
                if line["key"] == key:
                    kept.append(RunResult(**line["result"]))
        return kept

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
    report: Report = _silent,
) -> Calibration:
    """Run everything and return the calibration. Raises `TierError` if the tier cannot be calibrated as it
    is (a record misses the target within its horizon, or fails)."""
    with contextlib.closing(Runs(tier, backend, workers, report, fresh)) as runs:
        curves = {r.name: _curve(tier, r, runs, seeds) for r in tier.records.values()}
        boundary = boundary_of(tier, report)
        names = dict.fromkeys((tier.table.reward.start, tier.table.reward.anchor, *value))
        rerun = {name: _settle(tier, name, curves, boundary[0], runs, reruns) for name in names}
        last = runs.last
    about = {
        "command": f"nanogpt-env tiers calibrate {tier.name} --seeds {seeds} --reruns {reruns}",
        "versions": last.versions if last else {},
        "hardware": last.hardware if last else {},
        "sandbox": last.sandbox.model_dump() if last else {},
    }
    return assemble(tier, curves, rerun, boundary, about)


def recompute(tier: Tier, old: Calibration, report: Report = _silent) -> Calibration:
    """The calibration of a tier whose target, verification or budget was changed, from the losses in `old`.

    Raises `TierError` if what was trained has changed, or if a value moved too far from its reruns.
    """
    if old.trained != tier.trained():
        raise TierError(f"tier {tier.name}: model, data, batch or records have changed; its records must be run again")
    curves = {
        name: Curve(np.array(c["steps"]), np.array(c["hidden_losses"])) for name, c in old.evidence["curves"].items()
    }
    for name, curve in curves.items():
        _check_crossing(tier.record(name), curve, tier.table.training.target)
    rerun = {
        name: Reruns(*(np.array(v[key], dtype=np.float64) for key in ("claims", "hidden_losses", "public_losses")))
        for name, v in old.evidence["values"].items()
    }
    about = {key: old.evidence[key] for key in ("command", "versions", "hardware", "sandbox")}
    new = assemble(tier, curves, rerun, boundary_of(tier, report), about)
    for name, r in rerun.items():
        value = new.records[name].value or 0.0
        if abs(value - r.claim) > FAR * r.claim:
            raise TierError(
                f"record {name} was rerun at step {r.claim}, but its value would now be {value:g}: run the calibration"
            )
    return new


def assemble(
    tier: Tier, curves: dict[str, Curve], rerun: dict[str, Reruns], boundary: tuple[float, float], about: dict[str, Any]
) -> Calibration:
    """Pure arithmetic: from losses to a calibration. `boundary` is (constant, its standard error)."""
    target = tier.table.training.target
    noise = _noise(curves, rerun, target)
    test = _test(tier, _sigma(noise), boundary[0])
    valued = {name: _value(test, curves[name], r, target) for name, r in rerun.items()}
    records = {name: _record(test, curve, noise[name][0], valued.get(name), target) for name, curve in curves.items()}
    return Calibration(
        fingerprint=tier.fingerprint(),
        trained=tier.trained(),
        sigma=_sigma(noise),
        boundary=boundary[0],
        boundary_level=tier.level(),
        records=records,
        power=_power(test, [r.loss_sd for r in records.values()]),
        evidence={
            **about,
            "boundary_error": boundary[1],
            "curves": {
                n: {"steps": c.steps.tolist(), "hidden_losses": np.round(c.losses, 6).tolist()}
                for n, c in curves.items()
            },
            "values": valued,
        },
        **_shard_offset([rerun[n] for n in (tier.table.reward.start, tier.table.reward.anchor)]),
    )


def boundary_of(tier: Tier, report: Report = _silent) -> tuple[float, float]:
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
    _check_crossing(record, curve, tier.table.training.target)
    return curve


def _check_crossing(record: HumanRecord, curve: Curve, target: float) -> None:
    if (curve.losses[:, 0] <= target).any():
        raise TierError(
            f"record {record.name} is below the target {target:g} already at step {curve.steps[0]:g}, "
            f"{GRID[0]:.0%} of its horizon: shorten its horizon in its record.toml or lower the target"
        )
    if not (curve.losses[:, -1] <= target).all():
        worst = curve.losses[:, -1].max()
        raise TierError(
            f"record {record.name} misses the target {target:g} within its horizon of {record.horizon} steps "
            f"(loss {worst:.4f}): lengthen the horizon in its record.toml or raise the target"
        )


def _crossing(steps: Any, losses: Any, target: float) -> float:
    below = max(1, int(np.argmax(losses <= target)))
    fraction = (losses[below - 1] - target) / (losses[below - 1] - losses[below])
    return float(steps[below - 1] + fraction * (steps[below] - steps[below - 1]))


def _test(tier: Tier, sigma: float, boundary: float) -> SequentialTest:
    v = tier.table.verification
    target = tier.table.training.target
    return SequentialTest.for_tier(target, sigma, tier.level(), v.n_min, v.n_max, boundary)


def _noise(curves: dict[str, Curve], rerun: dict[str, Reruns], target: float) -> dict[str, tuple[float, int]]:
    """(sd of the hidden loss, n) of each record: from its reruns, else from its curves at the target."""
    noise = {}
    for name, curve in curves.items():
        if name in rerun:
            losses = rerun[name].at_claim(curve)
        else:
            at = float(np.mean(curve.crossings(target)))
            losses = np.array([np.interp(at, curve.steps, row) for row in curve.losses])
        noise[name] = (float(losses.std(ddof=1)), len(losses))
    return noise


def _sigma(noise: dict[str, tuple[float, int]]) -> float:
    return upper_sd(noise.values())[1]


def _settle(tier: Tier, name: str, curves: dict[str, Curve], boundary: float, runs: Runs, reruns: int) -> Reruns:
    """Reruns of a record at (about) the claim that verification accepts with power 0.9."""
    data, target, record = tier.table.data, tier.table.training.target, tier.record(name)
    noise = _noise(curves, {}, target)
    claim = _first_claim(
        curves[name], target - margin_for_power(_test(tier, _sigma(noise), boundary), noise[name][0]), record
    )
    found = Reruns(np.array([]), np.array([]), np.array([]))
    for _ in range(MAX_PASSES):
        job = tier.job(record.source, claim, record.horizon, "", (data.hidden, data.public))
        results = runs.get(f"{name}: value at step {claim}", job, reruns)
        hidden, public = ([r.val_losses[shard] for r in results] for shard in (data.hidden, data.public))
        found = found.plus(claim, hidden, public)
        test = _test(tier, _sigma(_noise(curves, {name: found}, target)), boundary)
        value = _value(test, curves[name], found, target)
        claim = min(round(value["value"]), record.horizon)
        if abs(value["value"] - found.claim) <= max(1.0, 2 * value["error"]) or claim in found.claims:
            break
    return found


def _first_claim(curve: Curve, loss: float, record: HumanRecord) -> int:
    """Where the curve's few seeds reach `loss` on average."""
    mean = curve.losses.mean(axis=0)
    if mean[-1] > loss:
        raise TierError(
            f"record {record.name} ends at a mean loss of {mean[-1]:.4f}, but a claim needs {loss:.4f} "
            f"within its horizon of {record.horizon} steps: lengthen the horizon in its record.toml"
        )
    return math.ceil(_crossing(curve.steps, mean, loss))


def _value(test: SequentialTest, curve: Curve, rerun: Reruns, target: float) -> dict[str, Any]:
    """The claim accepted with power 0.9, by the reruns' loss and the curve's slope; with its standard error."""
    losses = rerun.at_claim(curve)
    n, mean, sd = len(losses), float(losses.mean()), float(losses.std(ddof=1))
    slope, needed = curve.slope_at(rerun.claim), margin_for_power(test, sd, POWER)
    # two sources of error: the mean, and the sd through the margin that it asks for
    up, down = (margin_for_power(test, sd * f, POWER) for f in (1.05, 0.95))
    sd_error = sd / math.sqrt(2 * (n - 1))
    return {
        "claim": rerun.claim,
        "claims": rerun.claims.astype(int).tolist(),
        "n": n,
        "value": rerun.claim + (needed - (target - mean)) / slope,
        "error": math.hypot(sd / math.sqrt(n), (up - down) / (0.1 * sd) * sd_error) / slope,
        "loss_mean": mean,
        "loss_sd": sd,
        "slope": slope,
        "margin_for_power": needed,
        "hidden_losses": np.round(rerun.hidden, 6).tolist(),
        "public_losses": np.round(rerun.public, 6).tolist(),
    }


def _shard_offset(reruns: list[Reruns]) -> dict[str, float]:
    per_record = [r.public - r.hidden for r in reruns]
    within = [float(d.var(ddof=1)) for d in per_record]
    errors = [w / len(d) for w, d in zip(within, per_record, strict=True)]
    return {
        "shard_offset": float(np.mean([d.mean() for d in per_record])),
        "shard_offset_error": math.sqrt(sum(errors)) / len(errors),
        "shard_offset_sd": math.sqrt(sum(within) / len(within)),
    }


def _record(
    test: SequentialTest, curve: Curve, sd: float, value: dict[str, Any] | None, target: float
) -> RecordCalibration:
    crossings = curve.crossings(target)
    # with a value: its reruns correct the few curves' mean at the claim
    shift = value["loss_mean"] - curve.mean_at(value["claim"]) if value else 0.0
    runs = value["n"] if value else len(crossings)
    horizon, spare = int(curve.steps[-1]), SLACK * test.futility_sd / math.sqrt(runs)
    steps = range(int(curve.steps[0]), horizon + 1)
    sure = (
        k for k in steps
        if predicted_power(test, target - curve.mean_at(k) - shift - spare, sd, runs) >= SURE
    )  # fmt: skip
    return RecordCalibration(
        steps_mean=float(np.mean(crossings)),
        steps_sd=float(np.std(crossings, ddof=1)),
        steps_n=len(crossings),
        value=round(value["value"], 1) if value else None,
        value_error=round(value["error"], 2) if value else None,
        value_n=value["n"] if value else 0,
        claim=next(sure, None),
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

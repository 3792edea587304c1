"""Measure a tier: its records' steps to the target, the values of start and anchor, noise, boundary, power.

Of the steps track; docs/tiers.md ("Calibration") describes the procedure.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanogpt_env.backends import Backend
from nanogpt_env.errors import TierError
from nanogpt_env.measure import Report, Runs, boundary_of, loss_test, power_table, sigma, silent
from nanogpt_env.stats import SequentialTest, margin_for_power, predicted_power
from nanogpt_env.tables import StepsCalibration, StepsRecord, StepsRecordCalibration
from nanogpt_env.tracks import StepsTier
from nanogpt_env.types import Plan

# Where a record's run is evaluated on the whole hidden shard, as shares of its horizon.
GRID = (0.70, 0.78, 0.84, 0.88, 0.91, 0.94, 0.96, 0.98)
POWER, SURE = 0.9, 0.9995
# A claim for demonstrations has this many standard errors to spare, for what a few seeds get wrong.
SLACK = 1.7
# A value further than two standard errors from the claim that was rerun is measured again at the new claim.
MAX_PASSES = 3
# Further than this share of the claim, reruns say nothing about a value.
FAR = 0.05


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


def calibrate(
    tier: StepsTier,
    backend: Backend,
    *,
    seeds: int = 5,
    reruns: int = 20,
    value: Iterable[str] = (),
    workers: int = 1,
    fresh: bool = False,
    report: Report = silent,
) -> StepsCalibration:
    """Run everything and return the calibration. Raises `TierError` if the tier cannot be calibrated as it
    is (a record misses the target within its horizon, or fails)."""
    with contextlib.closing(Runs(tier, backend, workers, report, fresh)) as runs:
        curves = {r.name: _curve(tier, r, runs, seeds) for r in tier.records.values()}
        boundary = boundary_of(tier, report)
        names = dict.fromkeys((*tier.table.valued, *value))
        rerun = {name: _settle(tier, name, curves, boundary[0], runs, reruns) for name in names}
        last = runs.last
    about = {
        "command": f"nanogpt-env tiers calibrate {tier.name} --seeds {seeds} --reruns {reruns}",
        "versions": last.versions if last else {},
        "hardware": last.hardware if last else {},
        "sandbox": last.sandbox.model_dump() if last else {},
    }
    return assemble(tier, curves, rerun, boundary, about)


def recompute(tier: StepsTier, old: StepsCalibration, report: Report = silent) -> StepsCalibration:
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
    tier: StepsTier,
    curves: dict[str, Curve],
    rerun: dict[str, Reruns],
    boundary: tuple[float, float],
    about: dict[str, Any],
) -> StepsCalibration:
    """Pure arithmetic: from losses to a calibration. `boundary` is (constant, its standard error)."""
    target = tier.table.training.target
    noise = _noise(curves, rerun, target)
    test = loss_test(tier, sigma(noise.values()), boundary[0])
    valued = {name: _value(test, curves[name], r, target) for name, r in rerun.items()}
    records = {name: _record(test, curve, noise[name][0], valued.get(name), target) for name, curve in curves.items()}
    return StepsCalibration(
        fingerprint=tier.fingerprint(),
        trained=tier.trained(),
        sigma=sigma(noise.values()),
        boundary=boundary[0],
        boundary_level=tier.level(),
        records=records,
        power=power_table(test, [r.loss_sd for r in records.values()]),
        evidence={
            **about,
            "boundary_error": boundary[1],
            "curves": {
                n: {"steps": c.steps.tolist(), "hidden_losses": np.round(c.losses, 6).tolist()}
                for n, c in curves.items()
            },
            "values": valued,
        },
        **_shard_offset([rerun[n] for n in tier.table.valued]),
    )


def _curve(tier: StepsTier, record: StepsRecord, runs: Runs, seeds: int) -> Curve:
    data, horizon = tier.table.data, record.horizon
    job = tier.job(record.sources, Plan(steps=horizon, horizon=horizon), "", (data.hidden,))
    points = tuple(round(share * horizon) for share in GRID)
    job = job.model_copy(update={"points": points, "point_tokens": 1 << 30})
    results = runs.get(f"{record.name}: curve", job, seeds)
    curve = Curve(
        np.array([step for step, _ in results[0].val_points], dtype=np.float64),
        np.array([[loss for _, loss in r.val_points] for r in results]),
    )
    _check_crossing(record, curve, tier.table.training.target)
    return curve


def _check_crossing(record: StepsRecord, curve: Curve, target: float) -> None:
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


def _settle(tier: StepsTier, name: str, curves: dict[str, Curve], boundary: float, runs: Runs, reruns: int) -> Reruns:
    """Reruns of a record at (about) the claim that verification accepts with power 0.9."""
    data, target, record = tier.table.data, tier.table.training.target, tier.record(name)
    noise = _noise(curves, {}, target)
    claim = _first_claim(
        curves[name],
        target - margin_for_power(loss_test(tier, sigma(noise.values()), boundary), noise[name][0]),
        record,
    )
    found = Reruns(np.array([]), np.array([]), np.array([]))
    for _ in range(MAX_PASSES):
        plan = Plan(steps=claim, horizon=record.horizon)
        job = tier.job(record.sources, plan, "", (data.hidden, data.public))
        results = runs.get(f"{name}: value at step {claim}", job, reruns)
        hidden, public = ([r.val_losses[shard] for r in results] for shard in (data.hidden, data.public))
        found = found.plus(claim, hidden, public)
        test = loss_test(tier, sigma(_noise(curves, {name: found}, target).values()), boundary)
        value = _value(test, curves[name], found, target)
        claim = min(round(value["value"]), record.horizon)
        if abs(value["value"] - found.claim) <= max(1.0, 2 * value["error"]) or claim in found.claims:
            break
    return found


def _first_claim(curve: Curve, loss: float, record: StepsRecord) -> int:
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
) -> StepsRecordCalibration:
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
    return StepsRecordCalibration(
        steps_mean=float(np.mean(crossings)),
        steps_sd=float(np.std(crossings, ddof=1)),
        steps_n=len(crossings),
        value=round(value["value"], 1) if value else None,
        value_error=round(value["error"], 2) if value else None,
        value_n=value["n"] if value else 0,
        claim=next(sure, None),
        loss_sd=sd,
    )

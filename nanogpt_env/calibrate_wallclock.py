"""Measure a wallclock tier: losses of its records, their times beside the start record's, the noise of both, and how
far a table gets. docs/tiers.md ("Calibration") describes the procedure."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np

from nanogpt_env.backends import Backend
from nanogpt_env.content import content_root
from nanogpt_env.errors import BackendError, TierError
from nanogpt_env.measure import Report, Runs, boundary_of, loss_test, power_table, sigma, silent
from nanogpt_env.stats import SequentialTest, predicted_power, upper_sd
from nanogpt_env.tables import HostTiming, TimedRecordCalibration, WallclockCalibration
from nanogpt_env.tracks import WallclockTier
from nanogpt_env.types import Job, RunResult

MIN_POWER = 0.9
TABLE_MARGIN = 0.1
"""nats that the target must lie below the best table"""


def calibrate(
    tier: WallclockTier,
    backend: Backend,
    *,
    seeds: int = 5,
    reruns: int = 20,
    sessions: int = 2,
    workers: int = 1,
    fresh: bool = False,
    retime: bool = False,
    report: Report = silent,
) -> WallclockCalibration:
    """Run everything and return the calibration. Raises `TierError` if the tier cannot be calibrated as it is: a table
    comes close to the target, or a record fails or misses the target."""
    floor = {}
    if not tier.table.audit:  # of free models nobody knows what they can hold
        floor = table_floor(tier, report)
        check_table_floor(tier, floor)
    valued = tier.table.valued
    with contextlib.closing(Runs(tier, backend, workers, report, fresh, retime)) as runs:
        results = {
            name: runs.get(f"{name}: loss", _job(tier, name), reruns if name in valued else seeds)
            for name in tier.records
        }
        boundary = boundary_of(tier, report)
        others = {name: 1 for name in tier.records if name != valued[0]}
        timing = _time(tier, runs, {**others, _timed(tier): sessions})
        last = runs.last
    losses = {n: np.array([r.val_losses[tier.table.data.hidden] for r in rs]) for n, rs in results.items()}
    noise = {n: (float(x.std(ddof=1)), len(x)) for n, x in losses.items()}
    test = loss_test(tier, sigma(noise.values()), boundary[0])
    about = {
        "command": f"nanogpt-env tiers calibrate {tier.name} --seeds {seeds} --reruns {reruns} --sessions {sessions}",
        "versions": last.versions if last else {},
        "hardware": last.hardware if last else {},
        "sandbox": last.sandbox.model_dump() if last else {},
    }
    calibration = WallclockCalibration(
        fingerprint=tier.fingerprint(),
        trained=tier.trained(),
        sigma=test.futility_sd,
        boundary=boundary[0],
        boundary_level=tier.level(),
        power=power_table(test, [sd for sd, _ in noise.values()]),
        records={name: _record(test, losses[name], rs) for name, rs in results.items()},
        table_floor=floor,
        timing=timing,
        evidence={
            **about,
            "boundary_error": boundary[1],
            "hidden_losses": {name: np.round(x, 6).tolist() for name, x in losses.items()},
        },
    )
    return _with_values(tier, calibration)


def time_host(tier: WallclockTier, backend: Backend, sessions: int, report: Report = silent) -> HostTiming:
    """Time the anchor beside the start record on this host, or the start record beside itself. What is not measured
    here (other records) is taken from the calibration."""
    with contextlib.closing(Runs(tier, backend, 1, report, fresh=True, name=f"{tier.name}-timing")) as runs:
        found = _time(tier, runs, {_timed(tier): sessions})
    known = tier.measured.timing
    return found.model_copy(
        update={
            "log_ratios": {**known.log_ratios, **found.log_ratios},
            "log_ratio_errors": {**known.log_ratio_errors, **found.log_ratio_errors},
        }
    )


def table_floor(tier: WallclockTier, report: Report = silent) -> dict[str, float]:
    """Loss of the best bigram table in the tier's own model, and after a short finish; see gpu_backend/table_floor.py.

    Raises `BackendError` if it could not be fitted."""
    report("table floor", 0, 1)
    job = tier.job(tier.record(tier.table.reward.start).sources, None, "table floor", (tier.table.data.hidden,))
    script = content_root() / "gpu_backend" / "table_floor.py"
    command = [sys.executable, str(script)]
    done = subprocess.run(command, input=job.model_dump_json(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"the table could not be fitted:\n{done.stderr[-1000:]}")
    report("table floor", 1, 1)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def check_table_floor(tier: WallclockTier, floor: dict[str, float]) -> None:
    """Raises `TierError` if counting gets close to the target."""
    best, target = min(floor.values()), tier.table.training.target
    if target > best - TABLE_MARGIN:
        raise TierError(
            f"tier {tier.name}: a table of bigrams in this model reaches {best:.3f} nats with "
            f"{tier.table.training.tokens:,} tokens, and the target is {target:g}: it must be below "
            f"{best - TABLE_MARGIN:.3f}, or the tokens fewer"
        )


def _timed(tier: WallclockTier) -> str:
    """The record whose pairs with the start record tell how much times vary: the anchor, or the start record."""
    return tier.table.valued[-1]


def _job(tier: WallclockTier, name: str) -> Job:
    return tier.job(tier.record(name).sources, None, "", (tier.table.data.hidden,))


def _time(tier: WallclockTier, runs: Runs, sessions: dict[str, int]) -> HostTiming:
    """So many sessions of pairs of each record against the start record."""
    pairs, rows, evidence = tier.table.verification.pairs, {}, {}
    start = _job(tier, tier.table.reward.start)
    for name, count in sessions.items():
        found = []
        for session in range(1, count + 1):
            what = f"{name}: session {session} of pairs with {tier.table.reward.start}"
            found.append(runs.pairs(what, _job(tier, name), start, pairs, session))
        rows[name] = np.array([np.log(ours) - np.log(theirs) for ours, theirs in found])  # (sessions, pairs)
        evidence[name] = [{"seconds": ours, "start_seconds": theirs} for ours, theirs in found]
    # within sessions: what shifts a whole session moves both programs
    per_session = [(float(r.std(ddof=1)), len(r)) for record in rows.values() for r in record]
    return HostTiming(
        fingerprint=tier.fingerprint(),
        pair_sd=upper_sd(per_session)[1],
        pairs=sum(n for _, n in per_session),
        log_ratios={name: float(r.mean()) for name, r in rows.items()},
        log_ratio_errors={name: float(r.std(ddof=1) / math.sqrt(r.size)) for name, r in rows.items()},
        evidence={"sessions": evidence, "hardware": runs.last.hardware if runs.last else {}},
    )


def _record(test: SequentialTest, losses: Any, results: list[RunResult]) -> TimedRecordCalibration:
    mean, sd = float(losses.mean()), float(losses.std(ddof=1))
    return TimedRecordCalibration(
        loss_mean=mean,
        loss_sd=sd,
        loss_n=len(losses),
        power=round(predicted_power(test, test.target - mean, sd), 4),
        tokens=max(r.tokens for r in results),
    )


def _with_values(tier: WallclockTier, calibration: WallclockCalibration) -> WallclockCalibration:
    """With the records' values; raises `TierError` if start or anchor are not what the tier says they are."""
    measured, reward = tier.model_copy(update={"calibration": calibration, "host": None}), tier.table.reward
    for name in tier.table.valued:
        row = calibration.records[name]
        if row.power < MIN_POWER:
            raise TierError(
                f"record {name} has a mean loss of {row.loss_mean:.4f}: verification would accept it with a chance of "
                f"{row.power:.2f} only; let it train longer, or raise the target of {tier.table.training.target:g}"
            )
    used = calibration.records[reward.start].tokens
    if tier.table.training.tokens - used >= tier.table.training.max_batch_tokens:
        raise TierError(f"tier {tier.name}: its start record uses {used:,} tokens; set training.tokens to that")
    timing = calibration.timing
    values = {}
    for name, row in calibration.records.items():
        value = measured.value_of(name)
        error = value * timing.log_ratio_errors.get(name, 0.0)
        n = tier.table.verification.pairs * len(timing.evidence["sessions"].get(name, ()))
        values[name] = row.model_copy(update={"value": round(value, 4), "value_error": round(error, 4), "value_n": n})
    return calibration.model_copy(update={"records": values})

"""Tiers and runs made by hand, for tests that train nothing."""

import json
import shutil
from pathlib import Path

from nanogpt_env.content import content_root
from nanogpt_env.tables import (
    BudgetTable,
    Data,
    Model,
    Reward,
    StepsCalibration,
    StepsLimits,
    StepsRecord,
    StepsRecordCalibration,
    StepsTable,
    StepsTraining,
    Verification,
)
from nanogpt_env.tiers import CALIBRATION, load_tier
from nanogpt_env.tracks import StepsTier
from nanogpt_env.types import RunResult, SandboxInfo

LEVEL = 0.01 / 8
# boundary_constant(LEVEL, 5, 14, paths=40_000_000), rounded up by two errors; see test_stats.py
BOUNDARY = 3.244
SIGMA = 0.008
TARGET = 4.06
START, ANCHOR = 266.0, 141.0


def record_calibration(value=None, steps=200.0):
    return StepsRecordCalibration(
        steps_mean=steps, steps_sd=3.0, steps_n=4, value=value, value_error=None, claim=round(steps) + 20, loss_sd=SIGMA
    )


def calibration(fingerprint="none", names=("adamw", "normuon"), **changes):
    """`adamw` counts as 266 steps, `normuon` as 141, every other record is unvalued."""
    values = {"adamw": START, "normuon": ANCHOR}
    fields = {
        "fingerprint": fingerprint,
        "trained": "0" * 16,
        "sigma": SIGMA,
        "boundary": BOUNDARY,
        "boundary_level": LEVEL,
        "shard_offset": 0.0,
        "shard_offset_error": 0.0,
        "shard_offset_sd": 0.0,
        "records": {name: record_calibration(values.get(name)) for name in names},
        "power": {},
        "evidence": {},
    }
    return StepsCalibration(**(fields | changes))


def make_tier(**changes):
    """A tier like nano-steps, without a folder; `changes` go to its calibration."""
    table = StepsTable(
        name="stub-steps",
        summary="made by hand",
        track="steps",
        model=Model(layers=2, width=64, heads=2, vocab_size=1024, seq_len=128),
        data=Data(corpus="shakespeare"),
        training=StepsTraining(
            batch_size=8, target=TARGET, max_horizon=600, points=(0.25, 0.5, 0.75), point_tokens=4096
        ),
        limits=StepsLimits(
            deadline_s=120, setup_s=10, stall_s=10, rule_time=1.0, memory_mib=1024, source_bytes=1 << 14
        ),
        budget=BudgetTable(
            device_seconds=900, flops=2e13, tokens=2e7, runs=60, submissions=8, episode_steps=400, wall_seconds=14400
        ),
        verification=Verification(alpha=0.01, n_min=5, n_max=14),
        reward=Reward(start="adamw", anchor="normuon"),
    )
    records = {
        name: StepsRecord(
            name=name,
            technique=name,
            horizon=300,
            order=i,
            sources={"optimizer.py": "def configure(params, horizon): ..."},
        )
        for i, name in enumerate(("adamw", "normuon"))
    }
    return StepsTier(
        folder=Path("nowhere"), table=table, records=records, task="Train.", calibration=calibration(**changes)
    )


def make_run(points, shift=0.0, final=None, shard="val_public"):
    """A completed run whose evaluated steps and losses are `points`. Its whole-shard loss is `final`, or
    the last point's plus `shift`."""
    points = tuple(points)
    return RunResult(
        exit_reason="completed",
        val_points=points,
        val_losses={shard: points[-1][1] + shift if final is None else final},
        steps=points[-1][0],
        sandbox=SandboxInfo(name="none", trusted=False),
    )


def copy_tier(folder, *, calibrated=True, **changes):
    """A copy of envs/nano-steps in `folder`, with a calibration made by hand that fits it."""
    tier_folder = folder / "my-tier"
    shutil.copytree(content_root() / "envs" / "nano-steps", tier_folder)
    (tier_folder / CALIBRATION).unlink(missing_ok=True)
    if calibrated:
        write_calibration(tier_folder, **changes)
    return tier_folder


def write_calibration(tier_folder, **changes):
    """The calibration that fits what the folder holds now, but for `changes`."""
    tier = load_tier(tier_folder, calibrated=False)
    fields = {"boundary_level": tier.level(), "names": tuple(tier.records)} | changes
    made = calibration(**({"fingerprint": tier.fingerprint()} | fields))
    (tier_folder / CALIBRATION).write_text(json.dumps(made.model_dump()))


def edit(path, old, new):
    """Replace `old`, which must be there once: a test that edits nothing tests nothing."""
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {path}"
    path.write_text(text.replace(old, new))

"""Load a tier: a folder with `env.toml`, `task.md`, `records/` and the measured `calibration.json`.

docs/tiers.md explains every field and how to make a tier of your own.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from importlib import metadata, util
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from nanogpt_env.content import cache_dir, content_root
from nanogpt_env.errors import TierError
from nanogpt_env.stats import SequentialTest
from nanogpt_env.tables import Calibration, HumanRecord, StepsTable
from nanogpt_env.types import Limits, Record, StepsJob

ENTRY_POINTS = "nanogpt_env.tiers"
CALIBRATION = "calibration.json"
T = TypeVar("T", bound=Record)


class Tier(BaseModel):
    """A tier ready for use. `calibration` is None only when loaded for calibration."""

    model_config = {"frozen": True}

    folder: Path
    table: StepsTable
    records: dict[str, HumanRecord]
    """by name, in the order of the ladder"""
    task: str
    calibration: Calibration | None

    @property
    def name(self) -> str:
        return self.table.name

    @property
    def measured(self) -> Calibration:
        if self.calibration is None:
            raise TierError(f"tier {self.name} was loaded without its calibration")
        return self.calibration

    def value_of(self, record: str) -> float:
        """Steps that a record counts as. Raises `TierError` unless it was valued by reruns."""
        row = self.measured.records.get(self.record(record).name)
        if row is None or row.value is None:
            valued = [n for n, r in self.measured.records.items() if r.value is not None]
            raise TierError(
                f"record {record!r} of tier {self.name} has no measured value; choose one of {', '.join(valued)}, "
                f"or value it: nanogpt-env tiers calibrate {self.folder} --value {record}"
            )
        return row.value

    def record(self, name: str) -> HumanRecord:
        if name not in self.records:
            raise TierError(f"tier {self.name} has no record {name!r}; it has {', '.join(self.records)}")
        return self.records[name]

    def level(self) -> float:
        """Level of one submission: the episode's, spent evenly over its submissions."""
        return self.table.verification.alpha / self.table.budget.submissions

    def test(self) -> SequentialTest:
        v, c = self.table.verification, self.measured
        return SequentialTest.for_tier(self.table.training.target, c.sigma, self.level(), v.n_min, v.n_max, c.boundary)

    def limits(self) -> Limits:
        t = self.table.limits
        return Limits(
            deadline_s=t.deadline_s,
            setup_s=t.setup_s,
            stall_s=t.stall_s,
            rule_time=t.rule_time,
            memory_bytes=t.memory_mib << 20,
        )

    def corpus_folder(self) -> Path:
        beside = self.folder / self.table.data.corpus
        return beside if beside.is_dir() else content_root() / "gpu_backend" / "corpora" / self.table.data.corpus

    def job(self, source: str, steps: int, horizon: int, seed: str, shards: tuple[str, ...]) -> StepsJob:
        """The training job of a run; `shards` are evaluated at the end, the first also at the points."""
        t = self.table
        return StepsJob(
            source=source,
            model=t.model.model_dump(),
            corpus=str(self.corpus_folder()),
            cache=str(cache_dir()),
            batch_size=t.training.batch_size,
            steps=steps,
            horizon=horizon,
            seed=seed,
            limits=self.limits(),
            points=tuple(sorted({max(1, round(p * horizon)) for p in t.training.points})),
            point_tokens=t.training.point_tokens,
            train_shard=t.data.train,
            final_shards=shards,
        )

    def tokens_per_step(self) -> int:
        return self.table.training.batch_size * self.table.model.seq_len

    def flops_per_step(self) -> int:
        """Forward and backward of one step: 6 N_mm + 12 L d T per token; a test holds it to the trainer's."""
        m = self.table.model
        matmul_weights = m.layers * 12 * m.width**2 + m.vocab_size * m.width
        return self.tokens_per_step() * (6 * matmul_weights + 12 * m.layers * m.width * m.seq_len)

    def trained(self) -> str:
        """Hash of all that a record's losses depend on."""
        t = self.table
        content = {
            "model": t.model.model_dump(),
            "data": t.data.model_dump(),
            "batch_size": t.training.batch_size,
            "records": {r.name: [r.horizon, r.source] for r in self.records.values()},
        }
        return _digest(json.dumps(content, sort_keys=True) + self.manifest())

    def manifest(self) -> str:
        """The corpus's manifest, which has the hash of every shard."""
        return _read(self.corpus_folder() / "manifest.json")

    def fingerprint(self) -> str:
        """Hash of all that the calibration depends on."""
        t = self.table
        content = {
            "trained": self.trained(),
            "target": t.training.target,
            "verification": t.verification.model_dump(exclude={"slots"}),
            "valued": [t.reward.start, t.reward.anchor],
        }
        return _digest(json.dumps(content, sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def builtin_tiers() -> list[str]:
    return sorted(p.parent.name for p in (content_root() / "envs").glob("*/env.toml"))


def tier_folders() -> dict[str, Path]:
    """Every tier that has a name here: built-in ones and those of installed packages."""
    folders = {name: content_root() / "envs" / name for name in builtin_tiers()}
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        try:
            spec = util.find_spec(entry.value)
        except Exception:  # somebody else's broken package is no reason to fail
            continue
        if spec is not None and spec.origin:
            folders.setdefault(entry.name, Path(spec.origin).parent)
    return folders


def find_tier(name_or_path: str | Path) -> Path:
    """The folder of a tier, given by name or path. Raises `TierError` naming what there is."""
    folders = tier_folders()
    if str(name_or_path) in folders:
        return folders[str(name_or_path)]
    path = Path(name_or_path)
    if (path / "env.toml").is_file():
        return path.resolve()
    raise TierError(
        f"no tier {str(name_or_path)!r}: it is neither a folder with an env.toml nor one of {', '.join(folders)}"
    )


def load_tier(name_or_path: str | Path, *, calibrated: bool = True) -> Tier:
    """Read and check a tier. With `calibrated`, its calibration must be there and fit its contents.

    Raises `TierError` with the file and field at fault.
    """
    folder = find_tier(name_or_path)
    try:
        table = _read_toml(folder / "env.toml", StepsTable)
        records = _load_records(folder)
        tier = Tier(
            folder=folder,
            table=table,
            records=records,
            task=_read(folder / "task.md"),
            calibration=load_calibration(folder) if calibrated else None,
        )
        tier.record(table.reward.start)
        tier.record(table.reward.anchor)
        if calibrated:
            _check_calibration(tier)
    except (ValueError, OSError) as error:
        raise TierError(f"tier in {folder}: {error}") from None
    return tier


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TierError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TierError(f"cannot read {path}: {error}") from None


def _read_toml(path: Path, model: type[T], **known: Any) -> T:
    try:
        return model(**tomllib.loads(_read(path)), **known)
    except (TypeError, ValueError) as error:  # a field that is known may not be given: TypeError
        raise TierError(f"{path}: {error}") from None


def _load_records(folder: Path) -> dict[str, HumanRecord]:
    records = []
    for path in (folder / "records").glob("*/record.toml"):
        source = _read(path.parent / "optimizer.py")
        records.append(_read_toml(path, HumanRecord, name=path.parent.name, source=source))
    return {r.name: r for r in sorted(records, key=lambda r: (r.order, r.name))}


def load_calibration(folder: Path) -> Calibration:
    """Read `calibration.json`. Raises `TierError` if it is missing or malformed."""
    path = folder / CALIBRATION
    if not path.exists():
        raise TierError(f"{folder} is not calibrated: run `nanogpt-env tiers calibrate {folder}`")
    try:
        return Calibration.model_validate(json.loads(_read(path)))
    except (ValueError, RecursionError) as error:
        raise TierError(f"{path}: {error}") from None


def _check_calibration(tier: Tier) -> None:
    c = tier.measured
    way_out = f"run `nanogpt-env tiers calibrate {tier.folder}`"
    if c.fingerprint != tier.fingerprint():
        raise TierError(f"tier {tier.name} was changed after its calibration: {way_out}")
    if abs(c.boundary_level / tier.level() - 1) > 1e-9:
        raise TierError(
            f"tier {tier.name}: the boundary was computed for level {c.boundary_level:g} but alpha / submissions "
            f"is {tier.level():g}: {way_out} --recompute"
        )
    tier.test()
    start, anchor = (tier.value_of(r) for r in (tier.table.reward.start, tier.table.reward.anchor))
    if not start > anchor:
        raise TierError(
            f"tier {tier.name}: the start record ({start:g}) must need more steps than the anchor ({anchor:g})"
        )

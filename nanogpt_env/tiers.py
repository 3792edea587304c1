"""Load a tier: a folder with `env.toml`, `task.md`, `records/` and the measured `calibration.json`.

docs/tiers.md explains every field and how to make a tier of your own.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from importlib import metadata, util
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field

from nanogpt_env.content import cache_dir, content_root
from nanogpt_env.errors import TierError
from nanogpt_env.scoring import RewardForm
from nanogpt_env.stats import SequentialTest
from nanogpt_env.types import Limits, Record, StepsJob

ENTRY_POINTS = "nanogpt_env.tiers"
CALIBRATION = "calibration.json"
T = TypeVar("T", bound=Record)

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Model(Record):
    """Sizes of the trainer's GPT (`gpu_backend/model.py`)."""

    layers: Count
    width: Count
    heads: Count
    vocab_size: Count
    seq_len: Count


class Data(Record):
    corpus: str
    """a folder in gpu_backend/corpora, or a path relative to env.toml"""
    train: str = "train"
    public: str = "val_public"
    """evaluated in the agent's runs"""
    hidden: str = "val_hidden"
    """evaluated in verification only"""


class Training(Record):
    batch_size: Count
    target: Positive
    """validation loss to reach on the hidden shard, nats per token"""
    max_horizon: Count
    points: tuple[Annotated[float, Field(gt=0, lt=1)], ...]
    """where a run is evaluated on `point_tokens` tokens before its end, as shares of its horizon"""
    point_tokens: Count


class LimitsTable(Record):
    """As `types.Limits`, in the units people write; and the cap on the source."""

    deadline_s: Positive
    setup_s: Positive
    stall_s: Positive
    rule_time: Positive
    memory_mib: Count
    source_bytes: Count


class BudgetTable(Record):
    """Allowance of one episode. Research only, but for `submissions`: verification has its own meter."""

    device_seconds: Positive
    flops: Positive
    tokens: Positive
    runs: Count
    submissions: Count
    episode_steps: Count
    wall_seconds: Positive


class Verification(Record):
    alpha: Annotated[float, Field(gt=0, lt=0.5)]
    """level of a whole episode; a submission spends alpha / budget.submissions"""
    n_min: Annotated[int, Field(ge=2)]
    n_max: Annotated[int, Field(ge=3)]
    slots: Count = 1
    """runs at a time, the agent's and verification's each"""


class Reward(Record):
    form: RewardForm = "linear"
    start: str
    anchor: str


class TierTable(Record):
    """`env.toml` as written."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    summary: str
    track: Literal["steps"]
    model: Model
    data: Data
    training: Training
    limits: LimitsTable
    budget: BudgetTable
    verification: Verification
    reward: Reward


class RecordCalibration(Record):
    """What was measured of one record."""

    steps_mean: Positive
    """first step at which the hidden loss is at the target, interpolated; mean over seeds"""
    steps_sd: float
    steps_n: Count
    value: Positive | None = None
    """the claim that verification accepts with power 0.9"""
    value_error: float | None = None
    """standard error of `value`, steps"""
    value_n: int = 0
    claim: int | None
    """a claim with slack, for demonstrations: predicted to fail less than once in a thousand times; None if the
    record's horizon has no room for one"""
    loss_sd: float
    """sd of the hidden loss over reruns, nats"""


class Calibration(Record):
    """`calibration.json`, written by `nanogpt-env tiers calibrate`; `evidence` holds every loss."""

    fingerprint: str
    """of all that the calibration depends on"""
    trained: str
    """of what its runs depend on: model, data, batch, records"""
    sigma: Positive
    """scale of the test's constants, nats"""
    boundary: Positive
    """constant C of the sequential test at level alpha / submissions"""
    boundary_level: Positive
    shard_offset: float
    """mean loss on the public shard minus on the hidden one, nats"""
    shard_offset_error: float
    """standard error of `shard_offset`"""
    shard_offset_sd: float
    """sd of that difference from run to run"""
    records: dict[str, RecordCalibration]
    power: dict[str, Any]
    evidence: dict[str, Any]


class HumanRecord(Record):
    """`records/<name>/record.toml` and its optimizer.py."""

    name: str
    technique: str
    horizon: Count
    order: int
    source: str


class Tier(BaseModel):
    """A tier ready for use. `calibration` is None only when loaded for calibration."""

    model_config = {"frozen": True}

    folder: Path
    table: TierTable
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
        table = _read_toml(folder / "env.toml", TierTable)
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

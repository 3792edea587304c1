"""What a tier is, on each of the two tracks: its programs, jobs, tests and values."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

from nanogpt_env.content import cache_dir, content_root
from nanogpt_env.errors import ActionError, TierError
from nanogpt_env.human import load_table
from nanogpt_env.stats import SequentialTest
from nanogpt_env.tables import (
    Calibration,
    HostTiming,
    HumanRecord,
    Model,
    StepsCalibration,
    StepsRecord,
    StepsTable,
    TierTable,
    WallclockCalibration,
    WallclockTable,
)
from nanogpt_env.timing import PairTest
from nanogpt_env.trials import FixedTrial, LossTrial, TimeTrial, Trial
from nanogpt_env.types import Job, Limits, Plan, StepsJob, WallclockJob
from nanogpt_env.workspace import without_comments


@dataclasses.dataclass(frozen=True)
class Span:
    """What rewards are measured on: start and anchor with their values, and the record that episodes begin with."""

    start: str
    anchor: str
    start_value: float
    anchor_value: float
    program: str
    human_only: bool | None = None
    """of public records: whether what AI systems gained was left out"""
    cautions: tuple[str, ...] = ()
    """what to know before the two are compared"""


class Tier(BaseModel, abc.ABC):
    """A tier ready for use. `calibration` is None only when loaded for calibration."""

    model_config = {"frozen": True}
    unit: ClassVar[str]
    """of values"""

    folder: Path
    bases: tuple[Path, ...] = ()
    """folders of the tiers that it extends, the nearest first"""
    table: TierTable
    records: Mapping[str, HumanRecord]
    """by name, in the order of the ladder"""
    task: str
    calibration: Calibration | None

    @property
    def model_rule(self) -> Literal["fixed", "free"]:
        return getattr(self.table.training, "model_rule", "fixed")

    @property
    def name(self) -> str:
        return self.table.name

    @property
    def files(self) -> tuple[str, ...]:
        """What a candidate consists of."""
        return self.table.files

    @property
    @abc.abstractmethod
    def measured(self) -> Calibration:
        """Raises `TierError` if the tier was loaded without its calibration."""

    @abc.abstractmethod
    def value_of(self, record: str) -> float:
        """What a record counts as, in `unit`. Raises `TierError` unless that was measured."""

    @abc.abstractmethod
    def start_value_of(self, record: str) -> float:
        """What a record counts as when an episode starts from it."""

    @abc.abstractmethod
    def public_unit(self, start: float) -> float:
        """What a public table's figures are divided by; `start`: the start record's."""

    def span(self, start: str | None = None, anchor: str | None = None, human_only: bool | None = None) -> Span:
        """Start and anchor by the tier's own records or, on tiers with a [human] table, by selectors of public ones;
        left out, as the tier says. Raises `TierError` for what it has not, `ActionError` if the start is no slower."""
        reward, human = self.table.reward, self.table.human
        if human is None:
            if human_only is not None:
                raise ActionError(f"{self.name} is measured on its own records: human_only says nothing about them")
            start, anchor = start or reward.start, anchor or str(reward.anchor)
            span = Span(start, anchor, self.start_value_of(start), self.value_of(anchor), start)
        else:
            human_only = human.human_only if human_only is None else human_only
            table = load_table(human.track)
            try:
                first, last = table.select(start or human.start), table.select(anchor or human.anchor)
                gap = table.gap(first, last, human_only)
            except ValueError as error:
                raise TierError(f"tier {self.name}: {error}") from None
            unit = self.public_unit(first.value)
            span = Span(
                f"#{first.number}", f"#{last.number}", first.value / unit, (first.value - gap) / unit, reward.start,
                human_only, tuple(table.cautions(first, last)),
            )  # fmt: skip
        if not span.start_value > span.anchor_value:
            a, b = (self.format(value) for value in (span.start_value, span.anchor_value))
            raise ActionError(f"start record {span.start} ({a}) must be slower than anchor {span.anchor} ({b})")
        return span

    @abc.abstractmethod
    def job(self, sources: Mapping[str, str], plan: Plan | None, seed: str, shards: tuple[str, ...]) -> Job:
        """The training job of a run; `shards` are evaluated at its end."""

    @abc.abstractmethod
    def plan(self, horizon: int | None, steps: int | None) -> Plan | None:
        """A run's plan from what the agent gave. Raises `ActionError` if it makes no sense on this tier."""

    @abc.abstractmethod
    def most(self, plan: Plan | None) -> dict[str, float]:
        """The FLOPs and tokens that a run may use."""

    @abc.abstractmethod
    def trial(self, plan: Plan | None, start: float, best: float) -> Trial:
        """The verification of a program; `start`, `best`: values of the start record and the best program so far."""

    @abc.abstractmethod
    def trial_fields(self) -> dict[str, dict[str, float]]:
        """Constants of the trial's tests, for ledger and evidence."""

    @abc.abstractmethod
    def _trained(self) -> dict[str, Any]:
        """The tables that a record's losses depend on, beside model and data."""

    def format(self, value: float) -> str:
        return f"{value:.4g} {self.unit}"

    def record(self, name: str) -> HumanRecord:
        if name not in self.records:
            raise TierError(f"tier {self.name} has no record {name!r}; it has {', '.join(self.records)}")
        return self.records[name]

    def level(self) -> float:
        """Level of one submission: the episode's, spent evenly over its submissions."""
        return self.table.verification.alpha / self.table.budget.submissions

    def loss_test(self) -> SequentialTest:
        v, c = self.table.verification, self.measured
        return SequentialTest.for_tier(self.table.training.target, c.sigma, self.level(), v.n_min, v.n_max, c.boundary)

    def limits(self) -> Limits:
        t = self.table.limits
        return Limits(deadline_s=t.deadline_s, setup_s=t.setup_s, stall_s=t.stall_s, memory_bytes=t.memory_mib << 20)

    def corpus_folder(self) -> Path:
        name = self.table.data.corpus
        places = [folder / name for folder in (self.folder, *self.bases)]
        return next((p for p in places if p.is_dir()), content_root() / "gpu_backend" / "corpora" / name)

    def flops_per_token(self) -> int:
        """Forward and backward at the full length."""
        return flops_per_token(self.table.model)

    def _job_fields(self, seed: str, shards: tuple[str, ...]) -> dict[str, Any]:
        return {
            "model": self.table.model.fields(),
            "corpus": str(self.corpus_folder()),
            "cache": str(cache_dir()),
            "seed": seed,
            "limits": self.limits(),
            "train_shards": self.table.data.train_shards,
            "final_shards": shards,
            "gpus": self.table.gpus,
        }

    def trained(self) -> str:
        """Hash of all that a record's losses depend on."""
        content = {
            "model": self.table.model.fields(), "data": self.table.data.model_dump(), **self._trained(),
        }  # fmt: skip
        return _digest(json.dumps(content, sort_keys=True) + self.manifest())

    def manifest(self) -> str:
        """The corpus's manifest, which has the hash of every shard. Raises `TierError` if it cannot be read."""
        path = self.corpus_folder() / "manifest.json"
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TierError(f"cannot read {path}: {error}") from None

    def fingerprint(self) -> str:
        """Hash of all that the calibration depends on."""
        t = self.table
        content = {
            "trained": self.trained(),
            "target": t.training.target,
            "verification": t.verification.decisive(),
            "valued": list(t.valued),
        }
        return _digest(json.dumps(content, sort_keys=True))

    def _not_calibrated(self) -> TierError:
        return TierError(f"tier {self.name} was loaded without its calibration")


class StepsTier(Tier):
    """The candidate is an update rule; it counts as the steps that it needs."""

    unit = "steps"

    table: StepsTable
    records: Mapping[str, StepsRecord]
    calibration: StepsCalibration | None

    @property
    def measured(self) -> StepsCalibration:
        if self.calibration is None:
            raise self._not_calibrated()
        return self.calibration

    def record(self, name: str) -> StepsRecord:
        super().record(name)
        return self.records[name]

    def value_of(self, record: str) -> float:
        row = self.measured.records.get(self.record(record).name)
        if row is None or row.value is None:
            valued = [n for n, r in self.measured.records.items() if r.value is not None]
            raise TierError(
                f"record {record!r} of tier {self.name} has no measured value; choose one of {', '.join(valued)}, "
                f"or value it: nanogpt-env tiers calibrate {self.folder} --value {record}"
            )
        return row.value

    def start_value_of(self, record: str) -> float:
        return self.value_of(record)

    def public_unit(self, start: float) -> float:
        return 1.0

    def plan(self, horizon: int | None, steps: int | None) -> Plan:
        horizon = horizon or steps or self.record(self.table.reward.start).horizon
        steps, most = steps or horizon, self.table.training.max_horizon
        if not 1 <= steps <= horizon <= most:
            raise ActionError(f"need 1 <= steps <= horizon <= {most}, got {steps} steps of horizon {horizon}")
        return Plan(steps=steps, horizon=horizon)

    def most(self, plan: Plan | None) -> dict[str, float]:
        assert plan is not None
        tokens = plan.steps * self.tokens_per_step()
        return {"flops": float(tokens * self.flops_per_token()), "tokens": float(tokens)}

    def trial(self, plan: Plan | None, start: float, best: float) -> Trial:
        assert plan is not None
        return LossTrial(self.loss_test(), plan.steps)

    def trial_fields(self) -> dict[str, dict[str, float]]:
        return {"loss": _fields(self.loss_test())}

    def job(self, sources: Mapping[str, str], plan: Plan | None, seed: str, shards: tuple[str, ...]) -> StepsJob:
        """The first shard is evaluated at the points too."""
        assert plan is not None
        training = self.table.training
        return StepsJob(
            **self._job_fields(seed, shards),
            source=without_comments(sources[self.files[0]], self.files[0]),
            batch_size=training.batch_size,
            steps=plan.steps,
            horizon=plan.horizon,
            points=tuple(sorted({max(1, round(p * plan.horizon)) for p in training.points})),
            point_tokens=training.point_tokens,
            **training.changes(),
            save_every=training.save_every,
            **({"ranks": self.table.gpus, "exchange": "cuda"} if self.table.gpus else {}),
        )

    def limits(self) -> Limits:
        return super().limits().model_copy(update={"rule_time": self.table.limits.rule_time})

    def tokens_per_step(self) -> int:
        return self.table.training.batch_size * self.table.model.seq_len

    def _trained(self) -> dict[str, Any]:
        return {
            "batch_size": self.table.training.batch_size,
            **self.table.training.changes(),
            "records": {r.name: [r.horizon, r.sources[self.files[0]]] for r in self.records.values()},
        }


class WallclockTier(Tier):
    """The candidate is training code; it counts as its time's share of the start record's."""

    unit = "of the start's time"

    table: WallclockTable
    calibration: WallclockCalibration | None
    host: HostTiming | None = None
    """measured on this host; otherwise the calibration's is used"""

    @property
    def measured(self) -> WallclockCalibration:
        if self.calibration is None:
            raise self._not_calibrated()
        return self.calibration

    @property
    def timing(self) -> HostTiming:
        """This host's, unless the tier has changed since; else that of the host where the tier was calibrated."""
        measured = self.measured
        return self.host if self.host and self.host.fingerprint == measured.fingerprint else measured.timing

    def value_of(self, record: str) -> float:
        """As verification would pay it, submitted against the start record: the ratio of times that is measured, times
        exp(half width of the bound), since only what is shown is paid."""
        if record == self.table.reward.start:
            return 1.0
        if self.table.verification.protocol == "fixed":
            return self.start_value_of(record)
        return self.start_value_of(record) * math.exp(self.pair_test().half_width)

    def start_value_of(self, record: str) -> float:
        """Its time as a share of the start record's, as measured."""
        if self.record(record).name == self.table.reward.start:
            return 1.0
        if record not in self.timing.log_ratios:
            raise TierError(f"record {record!r} of tier {self.name} was not timed: calibrate the tier")
        return math.exp(self.timing.log_ratios[record])

    def public_unit(self, start: float) -> float:
        return start

    def plan(self, horizon: int | None, steps: int | None) -> None:
        if horizon is not None or steps is not None:
            raise ActionError(
                f"{self.name} is a wallclock tier: {self.files[0]} itself decides how long it trains, so steps, "
                "horizon and claim are left out"
            )

    def most(self, plan: Plan | None) -> dict[str, float]:
        tokens = self.table.training.tokens
        return {"flops": float(tokens * self.flops_per_token()), "tokens": float(tokens)}

    def trial(self, plan: Plan | None, start: float, best: float) -> Trial:
        v = self.table.verification
        if v.protocol == "fixed":
            return FixedTrial(v.runs, v.p, self.table.training.target, start, best)
        return TimeTrial(self.loss_test(), self.pair_test(), start, best)

    def trial_fields(self) -> dict[str, dict[str, float]]:
        v = self.table.verification
        if v.protocol == "fixed":
            return {"fixed": {"runs": v.runs, "p": v.p, "target": self.table.training.target}}
        return {"loss": _fields(self.loss_test()), "pairs": _fields(self.pair_test())}

    def pair_test(self) -> PairTest:
        v = self.table.verification
        return PairTest(pairs=v.pairs, level=self.level(), floor=self.timing.pair_sd, drift=v.drift)

    def job(self, sources: Mapping[str, str], plan: Plan | None, seed: str, shards: tuple[str, ...]) -> WallclockJob:
        training = self.table.training
        return WallclockJob(
            **self._job_fields(seed, shards),
            sources={name: without_comments(source, name) for name, source in sources.items()},
            tokens=training.tokens,
            max_batch_tokens=training.max_batch_tokens,
            model_rule=training.model_rule,
            audit=self.table.audit,
            compile_s=self.table.limits.compile_s,
            cache_bytes=self.table.limits.cache_mib << 20,
        )

    def limits(self) -> Limits:
        return super().limits().model_copy(update={"setup_cpu_s": self.table.limits.setup_cpu_s})

    def _trained(self) -> dict[str, Any]:
        training = self.table.training
        return {
            "tokens": training.tokens,
            "max_batch_tokens": training.max_batch_tokens,
            "audit": self.table.audit and self.table.audit.model_dump(),
            "records": {r.name: r.sources for r in self.records.values()},
        }


def matmul_weights(m: Model) -> int:
    """Weights that take part in matrix products: blocks and head, not the embedding's look-up."""
    return m.layers * 12 * m.width**2 + m.vocab_size * m.width


def flops_per_token(m: Model) -> int:
    """Forward and backward: 6 N_mm + 12 L d T at the full length T; a test holds it to the trainer's."""
    return 6 * matmul_weights(m) + 12 * m.layers * m.width * m.seq_len


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fields(test: SequentialTest | PairTest) -> dict[str, float]:
    return {f.name: float(getattr(test, f.name)) for f in dataclasses.fields(test)}

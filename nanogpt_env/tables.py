"""What a tier's files hold, as typed records: `env.toml`, `records/*/record.toml`, `calibration.json`.

docs/tiers.md explains every field.
"""

from __future__ import annotations

import abc
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from nanogpt_env.human import PublicTrack
from nanogpt_env.scoring import RewardForm
from nanogpt_env.types import AuditRules, Record, Track

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Model(Record):
    """Sizes of the trainer's GPT (`gpu_backend/model.py`)."""

    layers: Count
    width: Count
    heads: Count
    vocab_size: Count
    seq_len: Count
    public: bool = False
    """with the details of the public optimization track's"""

    def fields(self) -> dict[str, Any]:
        return self.model_dump(exclude_defaults=True)


class Data(Record):
    corpus: str
    """a folder in gpu_backend/corpora, or a path relative to env.toml"""
    train: str | tuple[str, ...] = "train"
    """name of a shard, or of several, which follow each other"""
    public: str = "val_public"
    """evaluated in the agent's runs"""
    hidden: str = "val_hidden"
    """evaluated in verification only"""

    @property
    def train_shards(self) -> tuple[str, ...]:
        return (self.train,) if isinstance(self.train, str) else self.train

    @property
    def shards(self) -> tuple[str, ...]:
        """All that it names, each once."""
        return tuple(dict.fromkeys((*self.train_shards, self.public, self.hidden)))


class Training(Record):
    target: Positive
    """validation loss to reach on the hidden shard, nats per token"""


class StepsTraining(Training):
    batch_size: Count
    max_horizon: Count
    points: tuple[Annotated[float, Field(gt=0, lt=1)], ...]
    """where a run is evaluated on `point_tokens` tokens before its end, as shares of its horizon"""
    point_tokens: Count
    numbers: Literal["fp32", "bf16"] = "fp32"
    """of the forward pass; the rule sees float32"""
    shards: Count = 1
    """sets of parameters that are updated without sight of each other, so that as many devices may share a run"""
    micro_batch: Annotated[int, Field(ge=0)] = 0
    """rows at a time on a device; 0: all"""
    compile: bool = False
    """the model, by torch.compile"""
    save_every: Annotated[int, Field(ge=0)] = 0
    """steps after which a run is saved, to go on if it is killed, at the same result; 0: never"""

    def changes(self) -> dict[str, Any]:
        """What differs from the defaults of how a batch is computed: losses do too, if only in the last digits."""
        given = self.model_dump(include={"numbers", "shards", "micro_batch", "compile"})
        return {name: value for name, value in given.items() if value != type(self).model_fields[name].default}


class WallclockTraining(Training):
    tokens: Count
    """training tokens that a run may use: what the start record uses"""
    max_batch_tokens: Count
    model_rule: Literal["fixed", "free"] = "fixed"
    """'free': the candidate has a model.py of its own, whose answers are audited"""


class LimitsTable(Record):
    """As `types.Limits`, in the units people write; and the cap on the source."""

    deadline_s: Positive
    setup_s: Positive
    stall_s: Positive
    memory_mib: Count
    source_bytes: Count


class StepsLimits(LimitsTable):
    rule_time: Positive


class WallclockLimits(LimitsTable):
    setup_cpu_s: Positive
    """CPU seconds of the set-up, whatever else runs here"""
    compile_s: Annotated[float, Field(ge=0)] = 0.0
    """of a process before the timed one, which inherits what it compiled and nothing else; 0: none"""
    cache_mib: Annotated[int, Field(ge=0)] = 0
    """of what it may hand on"""

    @model_validator(mode="after")
    def _cache_if_compiled(self) -> Self:
        if (self.compile_s > 0) != (self.cache_mib > 0):
            raise ValueError("compile_s and cache_mib are both positive, or both left out")
        return self


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

    def decisive(self) -> dict[str, Any]:
        """What verdicts depend on."""
        return self.model_dump(exclude={"slots"})


class WallclockVerification(Verification):
    protocol: Literal["pairs", "fixed"] = "pairs"
    """'fixed': as NanoGPT-Bench does, `runs` of each program, a t test of the loss at `p`, the mean time as it is"""
    runs: Annotated[int, Field(ge=2)] = 10
    p: Annotated[float, Field(gt=0, lt=0.5)] = 0.01
    pairs: Annotated[int, Field(ge=2)]
    """of the candidate's and the start record's runs in one session"""
    drift: Positive = 3.0
    """how far the start record's own times may move in a session, in units of the pair sd"""

    def decisive(self) -> dict[str, Any]:
        fixed = {"protocol", "runs", "p"}
        return self.model_dump(exclude={"slots"} if self.protocol == "fixed" else {"slots", *fixed})


class Reward(Record):
    form: RewardForm = "linear"
    start: str
    """the record that episodes begin with"""
    anchor: str | None = None
    """the record that 1 stands for; none where [human] says it"""


class Human(Record):
    """Rewards are measured between two records of a public table; `PublicTable.select` has the selectors."""

    track: PublicTrack
    start: str
    anchor: str
    human_only: bool = False
    """without what records gained that credit an AI system"""


class Published(Record):
    """Noise that others have published, for `tiers calibrate --published`."""

    sigma: Positive
    """sd of the final loss over runs, nats"""
    pair_sd: Positive | None = None
    """wallclock track: sd of a pair's log ratio of times"""
    source: str


class JudgeSeat(Record):
    """A judge beside the static one, which is asked before a submission is verified."""

    name: str
    """folder in judges/, path of a folder (relative to env.toml), or module:Class"""
    mode: Literal["veto", "advisory"] = "advisory"
    """whether it can deny; no judge can grant"""
    tokens: Count | None = None
    """of an episode; beyond them it is unavailable"""
    dollars: Positive | None = None
    """likewise; a price that is not known counts as none"""
    options: dict[str, Any] = Field(default_factory=dict)
    """fields instead of those in its `judge.toml`, or arguments of its class"""


class TierTable(Record):
    """`env.toml` as written: what every track has. With `extends` it is what differs from another tier's."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    summary: str
    track: Track
    gpus: Annotated[int, Field(ge=0)] = 0
    """that each run has to itself"""
    model: Model
    data: Data
    training: Training
    limits: LimitsTable
    budget: BudgetTable
    verification: Verification
    reward: Reward
    human: Human | None = None
    published: Published | None = None
    judges: tuple[JudgeSeat, ...] = ()

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if (self.human is None) == (self.reward.anchor is None):
            raise ValueError("the anchor is reward.anchor, a record of this tier, or a [human] table has it; not both")
        if self.human and (self.human.track == "optimization") != (self.track == "steps"):
            raise ValueError(f"the public track {self.human.track} is not measured in what a {self.track} tier is")
        return self

    @property
    def valued(self) -> tuple[str, ...]:
        """Records of this tier whose value is needed."""
        return (self.reward.start, self.reward.anchor) if self.reward.anchor else (self.reward.start,)

    @property
    @abc.abstractmethod
    def files(self) -> tuple[str, ...]:
        """What a candidate consists of."""


class StepsTable(TierTable):
    track: Literal["steps"]
    training: StepsTraining
    limits: StepsLimits

    @model_validator(mode="after")
    def _shared_out_evenly(self) -> Self:
        if self.gpus and (self.training.shards % self.gpus or self.training.batch_size % self.gpus):
            raise ValueError(f"training.shards and training.batch_size must be multiples of gpus ({self.gpus})")
        return self

    @property
    def files(self) -> tuple[str, ...]:
        return ("optimizer.py",)


class WallclockTable(TierTable):
    track: Literal["wallclock"]
    training: WallclockTraining
    limits: WallclockLimits
    verification: WallclockVerification
    audit: AuditRules | None = None
    """of free models, and only of them"""

    @property
    def files(self) -> tuple[str, ...]:
        return ("train.py", "model.py") if self.audit else ("train.py",)

    @model_validator(mode="after")
    def _audit_of_free_models(self) -> Self:
        if (self.training.model_rule == "free") != (self.audit is not None):
            raise ValueError("an [audit] table belongs to training.model_rule = 'free', and only to it")
        return self


class RecordCalibration(Record):
    """What was measured of one record."""

    value: Positive | None = None
    """what it counts as: steps, or share of the start record's time"""
    value_error: float | None = None
    """standard error of `value`"""
    value_n: int = 0
    """reruns, or pairs of runs, behind it"""
    loss_sd: float
    """sd of the hidden loss over reruns, nats"""


class StepsRecordCalibration(RecordCalibration):
    """`value` is the claim that verification accepts with power 0.9."""

    steps_mean: Positive
    """first step at which the hidden loss is at the target, interpolated; mean over seeds"""
    steps_sd: float
    steps_n: Count
    claim: int | None
    """a claim with slack, for demonstrations: predicted to fail less than once in a thousand times; None if the
    record's horizon has no room for one"""


class TimedRecordCalibration(RecordCalibration):
    """`value` is what verification pays for the record, submitted against the start record, on average."""

    loss_mean: float
    """hidden loss, nats"""
    loss_n: Count
    power: float
    """chance that the loss test accepts it"""
    tokens: Count
    """training tokens that it uses"""


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
    power: dict[str, Any]
    evidence: dict[str, Any]


class StepsCalibration(Calibration):
    shard_offset: float
    """mean loss on the public shard minus on the hidden one, nats"""
    shard_offset_error: float
    """standard error of `shard_offset`"""
    shard_offset_sd: float
    """sd of that difference from run to run"""
    records: dict[str, StepsRecordCalibration]


class HostTiming(Record):
    """What a host's clock says about a tier: in `calibration.json`, and in a file per host (`tiers time`)."""

    fingerprint: str
    """of the tier's records, data and settings"""
    pair_sd: Positive
    """sd of a pair's log ratio, upper 90 % confidence limit over all sessions: the floor of the test"""
    pairs: Annotated[int, Field(ge=0)]
    log_ratios: dict[str, float]
    """record -> ln of its time over the start record's, mean over pairs"""
    log_ratio_errors: dict[str, float]
    evidence: dict[str, Any]


class WallclockCalibration(Calibration):
    records: dict[str, TimedRecordCalibration]
    table_floor: dict[str, float]
    """loss of the best table that the tier's model can hold, and after a short finish; nats. Not of free models"""
    timing: HostTiming


class HumanRecord(Record):
    """`records/<name>/record.toml` and its program."""

    name: str
    technique: str
    order: int
    sources: dict[str, str]
    """file name -> text"""


class StepsRecord(HumanRecord):
    horizon: Count

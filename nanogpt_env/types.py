"""Frozen records that pass between the parts. No I/O, no logic beyond named constructors."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Track = Literal["steps", "wallclock"]

ExitReason = Literal[
    "completed",
    "candidate_error",
    "candidate_exited",
    "candidate_memory",
    "candidate_protocol",
    "candidate_stalled",
    "rule_too_slow",
    "checkpoint_refused",
    "audit_refused",
    "nonfinite_loss",
    "trainer_error",
    "deadline",
    "cancelled",
]


class Record(BaseModel):
    """Base: immutable, and a field that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SandboxInfo(Record):
    name: str
    version: str = ""
    trusted: bool
    note: str = ""


class Limits(Record):
    """Caps that the trainer holds a candidate to; see `gpu_backend/candidate.py`."""

    deadline_s: float = Field(gt=0)
    """training must have ended this many seconds after the run started"""
    setup_s: float = Field(gt=0)
    """for loading the candidate, up to and with the first step (steps) or up to the first real batch (wallclock)"""
    stall_s: float = Field(gt=0)
    """longest wait for one answer of the candidate"""
    memory_bytes: int = Field(gt=0)
    """memory the candidate may take beyond that of a process with torch loaded"""
    rule_time: float = Field(gt=0, default=1.0)
    """steps track: cap on the rule's CPU time as a multiple of forward + backward"""


class Job(Record):
    """What a backend trains; the JSON that `gpu_backend/trainer.py` reads. The first of `final_shards` is also
    evaluated on the way, on tracks that do so."""

    track: ClassVar[Track]
    model: dict[str, int]
    corpus: str
    cache: str
    seed: str
    limits: Limits
    train_shard: str
    final_shards: tuple[str, ...]


class StepsJob(Job):
    """An update rule to train with."""

    track = "steps"
    source: str
    batch_size: int
    steps: int
    horizon: int
    points: tuple[int, ...] = ()
    point_tokens: int = 4096


class AuditRules(Record):
    """How a free model is audited; see `gpu_backend/audit.py`."""

    positions: int = Field(ge=2)
    """asked again in each final shard"""
    tolerance: float = Field(gt=0)
    """largest |D|, in nats"""
    mean_tolerance: float = Field(gt=0)
    """largest |mean D|"""
    checkpoint_bytes: int = Field(gt=0)
    """data that a declaration may ask for"""
    evaluation_s: float = Field(gt=0)
    """longest life of each sandbox that evaluates"""


class Audit(Record):
    """What the audit of a free model says of one shard, in nats. D = answered - audited log-probability."""

    positions: int
    claimed_loss: float
    audited_loss: float
    """claimed_loss + mean_d; this is the loss that counts"""
    uncertainty: float
    """standard error of audited_loss"""
    mean_d: float
    max_abs_d: float


class WallclockJob(Job):
    """Training code to run."""

    track = "wallclock"
    sources: dict[str, str]
    tokens: int
    """training tokens that it may use"""
    max_batch_tokens: int
    model_rule: Literal["fixed", "free"] = "fixed"
    audit: AuditRules | None = None
    """for free models"""


class RunResult(Record):
    """One training run, as measured by the trainer. Losses are nats per token, times seconds.

    `log` is the candidate's own output: bounded, cleaned, untrusted.
    """

    exit_reason: ExitReason
    detail: str = ""
    train_losses: tuple[float, ...] = ()
    val_points: tuple[tuple[int, float], ...] = ()
    """(step, loss) on a small part of the first final shard"""
    val_losses: dict[str, float] = {}
    """whole final shards, by name; of free models the audited losses"""
    audits: dict[str, Audit] = {}
    """of free models, by shard; also when the audit refused. No more to the agent than the losses"""
    steps: int = 0
    tokens: int = 0
    flops: int = 0
    """computed from the model and the steps, forward and backward; 0 for free models"""
    device_seconds: float = 0.0
    train_seconds: float = 0.0
    rule_time_ratio: float = 0.0
    """the rule's CPU time over that of forward + backward"""
    trainer_peak_bytes: int = 0
    candidate_peak_bytes: int = 0
    log: str = ""
    sandbox: SandboxInfo
    versions: dict[str, str] = {}
    hardware: dict[str, Any] = {}

    @property
    def completed(self) -> bool:
        return self.exit_reason == "completed"


class Progress(Record):
    """Where a run is: steps, or tokens on the wallclock track."""

    done: int
    total: int
    train_loss: float | None = None
    evaluating: bool = False


class Verdict(Record):
    """What the agent sees of a verification."""

    accepted: bool
    claim: int
    """steps that the submission claimed to need"""
    horizon: int
    n: int
    """reruns that the decision rests on"""
    reason: str
    coarse_loss: float | None
    """mean validation loss of those reruns, rounded to 0.005 nat; None if a rerun did not finish"""
    device_seconds: float
    trusted: bool
    submission: str
    cached: bool = False
    """true if this is the earlier verdict on the same program, claim and horizon"""


class Rerun(Record):
    """One verification run in the evidence."""

    n: int
    seed: str
    exit_reason: ExitReason
    detail: str = ""
    trusted: bool
    loss: float | None
    """on the hidden shard"""
    device_seconds: float
    statistic: float | None = None
    threshold: float | None = None
    """what the statistic had to reach at this look; None where the test could not accept yet"""


class Evidence(Record):
    """Everything a verdict rests on. Kept by the operator, never shown to the agent."""

    submission: str
    tier: str
    snapshot: str
    source: str
    claim: int
    horizon: int
    test: dict[str, float]
    reruns: tuple[Rerun, ...]
    accepted: bool
    reason: str
    z_statistic: float | None
    """(target - mean) * sqrt(n) / sigma, the form of the optimization track's rule (which asks for 3.08): beside
    ours, for comparison; None if a rerun did not complete"""
    sandbox: SandboxInfo
    versions: dict[str, str]
    hardware: dict[str, Any]

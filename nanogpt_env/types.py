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
    "setup_too_long",
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
    setup_cpu_s: float = Field(gt=0, default=3600.0)
    """wallclock track: CPU seconds for the set-up"""
    rule_time: float = Field(gt=0, default=1.0)
    """steps track: cap on the rule's CPU time as a multiple of forward + backward"""


class Job(Record):
    """What a backend trains; the JSON that `gpu_backend/trainer.py` reads. The first of `final_shards` is also
    evaluated on the way, on tracks that do so."""

    track: ClassVar[Track]
    model: dict[str, Any]
    corpus: str
    cache: str
    seed: str
    limits: Limits
    train_shards: tuple[str, ...]
    final_shards: tuple[str, ...]
    gpus: int = 0
    """whole GPUs that the run has to itself"""
    gpu_ids: tuple[str, ...] = ()
    """which, once they are reserved"""
    cores: tuple[int, ...] = ()
    """the cores that training code may use; none: all. An update rule's time is counted on all of them"""


class Plan(Record):
    """How far a run of an update rule goes. Training code decides that itself: no plan."""

    steps: int = Field(ge=1)
    """where the trainer stops"""
    horizon: int = Field(ge=1)
    """schedule length that the rule is told"""


class StepsJob(Job):
    """An update rule to train with."""

    track = "steps"
    source: str
    batch_size: int
    steps: int
    horizon: int
    points: tuple[int, ...] = ()
    point_tokens: int = 4096
    ranks: int = 1
    """trainers that share the run, a device each"""
    shards: int = 1
    """sets of parameters, each of which a rule updates without sight of the others"""
    micro_batch: int = 0
    """rows at a time and rank; 0: all"""
    numbers: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    save_every: int = 0
    """steps after which the run is saved, to go on if it is killed; 0: never"""
    exchange: str = ""
    """device where the rule has its own copy of parameters and gradients; none: it works on the shared memory"""


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
    compile_s: float = 0.0
    """longest life of a process before the timed one, which inherits what it compiled and nothing else; 0: none"""
    cache_bytes: int = 0
    """of what it may hand on"""


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
    """of free models, by shard; also when the audit refused. A verdict shows them rounded"""
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
    shared: bool = False
    """true if it was trained for another request of an identical run"""
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


class Timing(Record):
    """A candidate's training time beside the start record's, from pairs of runs in one session."""

    ratio: float
    """its seconds over the start record's, geometric mean over the pairs"""
    bound: float
    """upper confidence bound of that ratio, at the submission's level: what an acceptance is paid by"""
    seconds: float
    """its mean training seconds"""


class Finding(Record):
    """One break of a rule, at a line of the sources."""

    rule: str
    file: str
    line: int
    """from 1"""
    why: str = ""
    """free text of the judge, bounded"""


Judgement = Literal["pass", "break", "unavailable"]


class Opinion(Record):
    """What one judge says. `unavailable`: it was not to be had, for the reason in `detail`, and says nothing."""

    judge: str
    outcome: Judgement
    findings: tuple[Finding, ...] = ()
    detail: str = ""
    reached: bool = False
    """of one that is unavailable: it answered, but not so that it could be used"""
    votes: tuple[Judgement, ...] = ()
    agreement: float | None = None
    """share of the votes that were to be had that say what the outcome says"""
    model: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    dollars: float | None = 0.0
    """None where the price is not known"""
    seconds: float = 0.0
    cached: bool = False
    """true if no model had to be asked"""

    def text(self) -> str:
        """In a few words; where it broke which rule."""
        said = "; ".join(f"{f.rule} at {f.file} line {f.line}" for f in self.findings)
        return f"{self.judge}: {said or self.detail or self.outcome}"


class Verdict(Record):
    """What the agent sees of a verification."""

    accepted: bool
    value: float | None
    """what it counts as: the claim in steps, or a share of the start record's time; None if rejected"""
    claim: int | None
    """steps track: the steps that the submission claimed to need"""
    horizon: int | None
    n: int
    """runs of the candidate that the decision rests on"""
    reason: str
    coarse_loss: float | None
    """mean validation loss of those runs, rounded to 0.005 nat; None if one did not finish"""
    time: Timing | None = None
    """wallclock track: None if the decision came before the last pair"""
    audit: Audit | None = None
    """free models: of the run whose answers could be repeated worst; `claimed_loss` and `audited_loss` are rounded"""
    opinions: tuple[Opinion, ...] = ()
    """of the tier's judges, in their order"""
    vetoed_by: str = ""
    """the judge that denied it, before any run"""
    device_seconds: float
    trusted: bool
    submission: str
    cached: bool = False
    """true if this is the earlier verdict on the same program, claim and horizon"""


Role = Literal["candidate", "start", "warm-up"]
"""whose run it is in a verification: the candidate's, the start record's, or one of the latter that does not count"""


class Rerun(Record):
    """One verification run in the evidence."""

    n: int
    role: Role = "candidate"
    session: int = 0
    """wallclock track: of paired runs, from 1; 0 for runs that are not timed"""
    seed: str
    exit_reason: ExitReason
    detail: str = ""
    trusted: bool
    loss: float | None
    """on the hidden shard"""
    audit: Audit | None = None
    """of a free model, on the hidden shard"""
    device_seconds: float
    train_seconds: float
    statistic: float | None = None
    threshold: float | None = None
    """what the statistic had to reach at this look; None where the test could not accept yet"""


class Evidence(Record):
    """Everything a verdict rests on. Kept by the operator, never shown to the agent."""

    submission: str
    tier: str
    snapshot: str
    sources: dict[str, str]
    claim: int | None
    horizon: int | None
    start: str
    """the record that it was timed against, on the wallclock track"""
    best: float
    """value that it had to beat there"""
    tests: dict[str, dict[str, float]]
    reruns: tuple[Rerun, ...]
    accepted: bool
    reason: str
    time: Timing | None
    z_statistic: float | None
    """(target - mean) * sqrt(n) / sigma, the form of the optimization track's rule (which asks for 3.08): beside
    ours, for comparison; None if a rerun did not complete"""
    sandbox: SandboxInfo
    versions: dict[str, str]
    hardware: dict[str, Any]

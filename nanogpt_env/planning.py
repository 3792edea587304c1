"""Propose a tier for a FLOP budget, and write its folder. docs/tiers.md ("A FLOP budget") derives the numbers.

Model and tokens are in the proportion of what is known to train well. The loss of the start record is taken to be
E + A / N^a + B / D^b, N: weights in matrix products, D: training tokens; `Plan.extrapolated` says when a plan lies
outside of what that was fitted to.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_env.errors import TierError
from nanogpt_env.hardware import CPU, Hardware
from nanogpt_env.tables import Model, StepsTable
from nanogpt_env.tiers import find_tier, load_tier
from nanogpt_env.tracks import StepsTier, WallclockTier, flops_per_token, matmul_weights
from nanogpt_env.types import Record

E, A, A_EXPONENT, B_EXPONENT = 1.69, 406.4, 0.34, 0.28
"""Hoffmann et al. 2022, "Training compute-optimal large language models", approach 3"""
WORST_LOSS = 7.0
"""predicted, nats: no plan for what learns so little"""
TEMPLATE = "micro-steps"
MFU = {CPU: 0.35}
"""share of a device's peak that training reaches; of a GPU `GPU_MFU`, an estimate"""
GPU_MFU = 0.40
MEMORY_SHARE = 0.7
RUNS = 60
"""runs of the start record that an episode's budget pays for"""
FEWEST_STEPS = 100
SHARDS = 8
"""of parameters on GPU tiers: as many devices may share a run"""
ROOM = 1.5
"""longest horizon over the start record's"""


class Family(Record):
    """Models of one shape on one corpus."""

    corpus: str
    tokens: float
    """that there are to train on"""
    vocab_size: int
    seq_len: int
    head: int
    """width of an attention head"""
    aspect: int
    """width over layers"""
    tokens_per_weight: float
    batch: tuple[float, float]
    """tokens of a batch that is known to be good, and of its run; others grow with the root of the run's tokens"""
    shards: tuple[str, str, str]
    """train, public, hidden; {n} in the first is the number of a shard"""
    shard_tokens: float
    source: str


SHAKESPEARE = Family(
    corpus="shakespeare",
    tokens=2_044_552,
    vocab_size=1024,
    seq_len=128,
    head=32,
    aspect=32,
    tokens_per_weight=1.7,
    batch=(1024, 2.6e5),
    shards=("train", "val_public", "val_hidden"),
    shard_tokens=2_044_552,
    source="the start records of the built-in CPU tiers, as calibrated",
)
FINEWEB = Family(
    corpus="fineweb10B",
    tokens=1.03e10,
    vocab_size=50304,
    seq_len=1024,
    head=64,
    aspect=64,
    tokens_per_weight=15,
    batch=(524288, 1.835e9),
    shards=("fineweb_train_{n:06d}", "fineweb_val_000000[10485760:20971520]", "fineweb_val_000000[0:10485761]"),
    shard_tokens=1e8,
    source="GPT-2 small at 3.28 nats with Muon and 1.835e9 tokens: 3500 steps of the public optimization track",
)
FAMILIES = {family.corpus: family for family in (SHAKESPEARE, FINEWEB)}
SMALL_WEIGHTS, SMALL_TOKENS, SMALL_LOSS = 12 * 12 * 768**2 + 50304 * 768, 1.835e9, 3.28


class Law(Record):
    """Predicted loss in nats per token, and the range that it was fitted in."""

    e: float
    a: float
    b: float
    weights: tuple[float, float]
    tokens: tuple[float, float]

    def loss(self, weights: float, tokens: float) -> float:
        return float(self.e + self.a / weights**A_EXPONENT + self.b / tokens**B_EXPONENT)

    def within(self, weights: float, tokens: float) -> bool:
        return all(0.9 * low <= x <= 1.1 * high for x, (low, high) in ((weights, self.weights), (tokens, self.tokens)))


def published_law() -> Law:
    """As published, but for B, which is such that the public run comes out: with Muon tokens count for more."""
    left = SMALL_LOSS - E - A / SMALL_WEIGHTS**A_EXPONENT
    sizes = (SMALL_WEIGHTS, SMALL_WEIGHTS)
    return Law(e=E, a=A, b=left * SMALL_TOKENS**B_EXPONENT, weights=sizes, tokens=(SMALL_TOKENS, SMALL_TOKENS))


def measured_law() -> Law:
    """Least squares over the start records of the calibrated CPU tiers."""
    points = np.array(list(_measured()))
    weights, tokens, losses = points.T
    terms = np.stack([np.ones(len(points)), weights**-A_EXPONENT, tokens**-B_EXPONENT], axis=1)
    (e, a, b), *_ = np.linalg.lstsq(terms, losses, rcond=None)
    return Law(e=e, a=a, b=b, weights=(min(weights), max(weights)), tokens=(min(tokens), max(tokens)))


def _measured() -> Iterator[tuple[float, float, float]]:
    """(weights, tokens, loss) of start records."""
    for name in ("nano-steps", "micro-steps", "nano-wallclock", "micro-wallclock"):
        tier = load_tier(name, host=False)
        weights, start = matmul_weights(tier.table.model), tier.table.reward.start
        if isinstance(tier, StepsTier):
            tokens = tier.measured.records[start].steps_mean * tier.tokens_per_step()
            yield weights, tokens, tier.table.training.target
        elif isinstance(tier, WallclockTier):
            row = tier.measured.records[start]
            yield weights, row.tokens, row.loss_mean


class Plan(Record):
    """A proposed tier. `seconds` of one start run; bytes of one device."""

    family: Family
    law: Law
    model: Model
    flops: float
    tokens: float
    batch_size: int
    steps: int
    target: float
    hardware: Hardware
    devices: int
    mfu: float
    seconds: float
    memory_bytes: float
    micro_batch: int
    """rows at a time and device that fit; the rest of the batch is accumulated"""
    extrapolated: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """In the words and units that people read."""
        weights = matmul_weights(self.model)
        return {
            "corpus": self.family.corpus,
            "model": f"{self.model.layers} layers of width {self.model.width}, {weights / 1e6:.3g} M weights",
            "tokens": f"{self.tokens:.3g} ({self.tokens / weights:.2g} per weight)",
            "batch": f"{self.batch_size} x {self.model.seq_len} tokens, {self.steps} steps",
            "target": f"{self.target:.2f} nats",
            "FLOPs": f"{self.flops:.2e}",
            "hardware": f"{self.devices} x {self.hardware.summary}",
            "time of a start run": f"{self.seconds:.3g} s at {self.mfu:.0%} of the peak",
            "memory": f"{self.memory_bytes / 1e9:.3g} GB a device, {self.micro_batch} rows at a time",
            "fitted to": self.family.source,
        }


def plan(flops: float, hardware: Hardware, devices: int = 1, corpus: str = "") -> Plan:
    """The model and tokens that use so many FLOPs. `corpus`: FineWeb from 1e14 FLOPs on, if left out. Raises
    `TierError` for a budget that is too small or too large for the corpus, or the device's memory."""
    if corpus not in ("", *FAMILIES):
        raise TierError(f"a plan is for {' or '.join(FAMILIES)}, not {corpus!r}")
    if not (math.isfinite(flops) and flops > 0 and devices >= 1):
        raise TierError(f"need positive FLOPs and at least one device, got {flops:g} and {devices}")
    family = FAMILIES[corpus] if corpus else (SHAKESPEARE if flops < 1e14 else FINEWEB)
    law = measured_law() if family is SHAKESPEARE else published_law()
    fitting = []
    for model in _models(family):
        tokens = flops / flops_per_token(model)
        if FEWEST_STEPS * _batch(family, tokens) * family.seq_len <= tokens <= family.tokens:
            if law.loss(matmul_weights(model), tokens) > WORST_LOSS:
                continue
            away = abs(math.log(tokens / matmul_weights(model) / family.tokens_per_weight))
            fitting.append((away, tokens, model))
    if not fitting:
        raise TierError(
            f"{flops:.2g} FLOPs cannot be spent well on {family.corpus}: it has {family.tokens:.3g} tokens, and a run "
            f"takes {FEWEST_STEPS} steps and gets below {WORST_LOSS:g} nats; try another --corpus, or another budget"
        )
    _, tokens, model = min(fitting, key=lambda found: found[0])
    return _finished(family, law, hardware, devices, model, tokens)


def _finished(family: Family, law: Law, hardware: Hardware, devices: int, model: Model, tokens: float) -> Plan:
    batch = _batch(family, tokens)
    steps = round(tokens / (batch * family.seq_len))
    tokens = float(steps * batch * family.seq_len)
    flops = tokens * flops_per_token(model)
    mfu = MFU.get(hardware.name, GPU_MFU)
    rows, memory = _memory(model, max(1, batch // devices), hardware.memory_bytes)
    weights, told = matmul_weights(model), []
    if not law.within(weights, tokens):
        (w0, w1), (t0, t1) = law.weights, law.tokens
        told.append(
            f"the target: fitted at {_range(w0, w1)} weights and {_range(t0, t1)} tokens; "
            "`tiers calibrate` says what the start record reaches"
        )
    if hardware.name not in MFU:
        told.append(f"the time: {GPU_MFU:.0%} of the peak is an estimate, not a measurement")
    return Plan(
        family=family, law=law, model=model, flops=flops, tokens=tokens, batch_size=batch, steps=steps,
        target=math.ceil(100 * law.loss(weights, tokens)) / 100, hardware=hardware, devices=devices, mfu=mfu,
        seconds=hardware.seconds(flops, mfu, devices), memory_bytes=memory, micro_batch=rows, extrapolated=tuple(told),
    )  # fmt: skip


def _range(low: float, high: float) -> str:
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _models(family: Family) -> Iterator[Model]:
    for heads in range(1, 129):
        width = heads * family.head
        yield Model(
            layers=max(1, round(width / family.aspect)), width=width, heads=heads, vocab_size=family.vocab_size,
            seq_len=family.seq_len,
        )  # fmt: skip


def _batch(family: Family, tokens: float) -> int:
    """Rows, a power of two, at least 8."""
    good, run = family.batch
    rows = good * math.sqrt(tokens / run) / family.seq_len
    return max(8, 1 << round(math.log2(max(rows, 1.0))))


def _memory(model: Model, rows: int, most: float) -> tuple[int, float]:
    """(rows at a time, bytes): parameters, gradients, two moments, and what is exchanged with the rule, in float32; of
    activations about 34 bytes a token, layer and unit of width (Korthikanti et al. 2022), logits twice in float32."""
    parameters = matmul_weights(model) + model.vocab_size * model.width
    fixed = 4.0 * parameters * 7
    a_row = model.seq_len * (34.0 * model.layers * model.width + 8.0 * model.vocab_size)
    while rows > 1 and fixed + rows * a_row > MEMORY_SHARE * most:
        rows //= 2
    if fixed + rows * a_row > MEMORY_SHARE * most:
        raise TierError(f"{(fixed + a_row) / 1e9:.3g} GB are needed, and a device has {most / 1e9:.3g}")
    return rows, fixed + rows * a_row


def write_tier(plan: Plan, folder: Path) -> StepsTier:
    """A folder that loads; to be calibrated before it is used. Raises `TierError` if it exists and is not empty."""
    if folder.exists() and any(folder.iterdir()):
        raise TierError(f"{folder} exists and is not empty")
    template = load_tier(TEMPLATE, calibrated=False)
    assert isinstance(template, StepsTier)
    shutil.copytree(find_tier(TEMPLATE) / "records", folder / "records")
    ratio = plan.steps / template.records[template.table.reward.start].horizon
    for path in (folder / "records").glob("*/record.toml"):
        text = path.read_text(encoding="utf-8")
        horizon = template.records[path.parent.name].horizon
        path.write_text(text.replace(f"horizon = {horizon}", f"horizon = {max(1, round(horizon * ratio))}"))
    (folder / "env.toml").write_text(_env_toml(plan, folder.name, template.table), encoding="utf-8")
    (folder / "task.md").write_text(_task(plan, folder.name, template), encoding="utf-8")
    tier = load_tier(folder, calibrated=False)
    assert isinstance(tier, StepsTier)
    return tier


def _env_toml(plan: Plan, name: str, template: StepsTable) -> str:
    family, seconds, on_cpu = plan.family, plan.seconds, plan.hardware.name == CPU
    train, public, hidden = family.shards
    count = math.ceil(ROOM * plan.tokens / family.shard_tokens)
    shards = [train.format(n=n) for n in range(1, count + 1)] if "{" in train else train
    tables: dict[str, dict[str, Any]] = {
        "model": plan.model.fields(),
        "data": {"corpus": family.corpus, "train": shards, "public": public, "hidden": hidden},
        "training": {
            "batch_size": plan.batch_size,
            "target": plan.target,
            "max_horizon": math.ceil(ROOM * plan.steps),
            "points": list(template.training.points),
            "point_tokens": template.training.point_tokens,
            **(
                {}
                if on_cpu
                else {"numbers": "bf16", "shards": SHARDS, "micro_batch": plan.micro_batch, "compile": True}
            ),
        },
        "limits": template.limits.model_dump()
        | {"deadline_s": math.ceil(4 * ROOM * seconds + 60), "memory_mib": 1024 + _mib(plan.model)},
        "budget": template.budget.model_dump()
        | {
            "device_seconds": math.ceil(RUNS * seconds * plan.devices),
            "flops": RUNS * plan.flops,
            "tokens": RUNS * plan.tokens,
            "runs": RUNS,
            "wall_seconds": math.ceil(2 * RUNS * seconds + 14400),
        },
        "verification": template.verification.model_dump(),
        "reward": template.reward.model_dump(exclude_none=True),
    }
    summary = f"{matmul_weights(plan.model) / 1e6:.3g} M weights, {plan.flops:.1e} FLOPs a start run on {family.corpus}"
    lines = ["# Planned for a FLOP budget, not yet calibrated. docs/tiers.md explains every field.",
             f'name = "{name}"', f'summary = "{summary}"', 'track = "steps"']  # fmt: skip
    if not on_cpu:
        lines.append(f"gpus = {plan.devices}")
    for title, fields in tables.items():
        lines += ["", f"[{title}]", *(f"{key} = {_toml(value)}" for key, value in fields.items())]
    return "\n".join(lines) + "\n"


def _mib(model: Model) -> int:
    """Six numbers a parameter for the rule: itself, its gradient and four of its own."""
    return math.ceil(4 * 6 * (matmul_weights(model) + model.vocab_size * model.width) / 2**20)


def _toml(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)


def _task(plan: Plan, name: str, template: StepsTier) -> str:
    """The template's, with other numbers."""
    m, parameters = plan.model, matmul_weights(plan.model) + plan.model.vocab_size * plan.model.width
    changes = {
        template.name: name,
        r"\(\d+ layers, width \d+, \d+ heads, [\d,]+ parameters,": f"({m.layers} layers, width {m.width}, {m.heads} "
        f"heads, {parameters:,} parameters,",
        r"vocabulary \d+, sequences of \d+, batches of \d+ sequences": f"vocabulary {m.vocab_size}, sequences of "
        f"{m.seq_len}, batches of {plan.batch_size} sequences",
        f"{template.table.training.target:.2f}": f"{plan.target:.2f}",
        r"\(about a minute of device time\)": f"(about {plan.seconds * plan.devices:.2g} s of device time)",
    }
    text = template.task
    for old, new in changes.items():
        text, count = re.subn(old, new, text)
        assert count, f"the task of {template.name} has no {old!r}"
    return text

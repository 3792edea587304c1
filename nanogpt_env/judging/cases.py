"""Judging the judges: labelled programs, and how a judge does on them.

A folder of cases has `accept/` and `reject/`, and in them diffs of a tier's start record (`*.diff`, below lines
"tier:", "breaks:" with the ids of rules, "note:"), or whole update rules (`*.py`).
"""

from __future__ import annotations

import datetime
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt_env.errors import ActionError
from nanogpt_env.judging import Judge, Material
from nanogpt_env.judging.llm import Recorded, Store
from nanogpt_env.judging.providers import Answer
from nanogpt_env.tiers import load_tier
from nanogpt_env.types import Opinion, Record
from nanogpt_env.workspace import Workspace

RULE_TIER = "nano-steps"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Case:
    name: str
    keeps: bool
    """whether it keeps the rules"""
    material: Material
    breaks: tuple[str, ...] = ()
    """ids of rules, any of which a judge may name"""
    note: str = ""


def read_cases(folder: Path) -> list[Case]:
    """Raises `ActionError` for a case that is none."""
    paths = [p for label in ("accept", "reject") for p in sorted((folder / label).glob("*")) if p.name[0] != "."]
    if not paths:
        raise ActionError(f"{folder} has no cases in accept/ and reject/")
    return [_case(path) for path in paths]


def _case(path: Path) -> Case:
    keeps, name = path.parent.name == "accept", f"{path.parent.name}/{path.stem}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ActionError(f"case {path}: {error}") from None
    if path.suffix == ".py":
        return Case(name, keeps, _material(RULE_TIER, {"optimizer.py": text}))
    if path.suffix != ".diff":
        raise ActionError(f"case {path}: a case is a .diff or a .py file")
    head, _, _ = text.partition("\n--- ")
    fields = dict(line.split(": ", 1) for line in head.splitlines() if ": " in line)
    breaks = tuple(rule.strip() for rule in fields.get("breaks", "").split(",") if rule.strip())
    if unknown := set(fields) - {"tier", "breaks", "note"} or ({"tier"} - set(fields)):
        raise ActionError(f"case {path}: its first lines are tier:, breaks: and note:, not {', '.join(unknown)}")
    try:
        material = _material(fields["tier"], patch=text[len(head) :].lstrip("\n"))
    except ActionError as error:
        raise ActionError(f"case {path}: {error}") from None
    return Case(name, keeps, material, breaks, fields.get("note", ""))


def _material(tier_name: str, sources: dict[str, str] | None = None, patch: str = "") -> Material:
    tier = load_tier(tier_name, calibrated=False)
    start = tier.record(tier.table.reward.start).sources
    workspace = Workspace(start, {}, tier.table.limits.source_bytes)
    if patch:
        workspace.patch(patch)
    return Material.of(tier, sources or workspace.files)


class Row(Record):
    """How a judge did on one case."""

    case: str
    keeps: bool
    right: bool
    """whether it said so; an opinion that was not to be had is not right"""
    named: bool | None
    """of a break that it saw: whether it named a rule that is broken; None where the case does not say which"""
    opinion: Opinion


class Evaluation(Record):
    """How a judge did. A rejection is what is looked for: precision is the share of its rejections that are right,
    recall the share of the rule breaks that it rejects."""

    judge: str
    model: str
    cases: int
    precision: float | None
    precision_interval: tuple[float, float] | None
    """Clopper and Pearson's, 95 %"""
    recall: float | None
    recall_interval: tuple[float, float] | None
    named: float | None
    """share of the right rejections that name a rule that is broken"""
    agreement: float | None
    """mean over cases of the share of votes that agree with the outcome"""
    unavailable: int
    input_tokens: int
    output_tokens: int
    dollars: float | None
    seconds: float
    rows: tuple[Row, ...]


def evaluate(judge: Judge, cases: Sequence[Case], on_case: Callable[[str], None] = lambda name: None) -> Evaluation:
    """Ask it about each of them."""
    rows = list(_rows(judge, cases, on_case))
    opinions = [row.opinion for row in rows]
    rejected = [row for row in rows if row.opinion.outcome == "break"]
    hits = sum(not row.keeps for row in rejected)
    bad = sum(not case.keeps for case in cases)
    named = [row.named for row in rejected if row.named is not None]
    agreement = [o.agreement for o in opinions if o.agreement is not None]
    dollars = [o.dollars for o in opinions]
    return Evaluation(
        judge=judge.name,
        model=next((o.model for o in opinions if o.model), ""),
        cases=len(rows),
        precision=_share(hits, len(rejected)),
        precision_interval=_interval(hits, len(rejected)),
        recall=_share(hits, bad),
        recall_interval=_interval(hits, bad),
        named=_share(sum(named), len(named)),
        agreement=_share(sum(agreement), len(agreement)),
        unavailable=sum(o.outcome == "unavailable" for o in opinions),
        input_tokens=sum(o.input_tokens for o in opinions),
        output_tokens=sum(o.output_tokens for o in opinions),
        dollars=None if None in dollars else sum(d for d in dollars if d),
        seconds=sum(o.seconds for o in opinions),
        rows=tuple(rows),
    )


def _rows(judge: Judge, cases: Sequence[Case], on_case: Callable[[str], None]) -> Iterator[Row]:
    for case in cases:
        on_case(case.name)
        opinion = judge.judge(case.material)
        right = opinion.outcome == ("pass" if case.keeps else "break")
        named = None
        if case.breaks and opinion.outcome == "break":
            named = bool({f.rule for f in opinion.findings} & set(case.breaks))
        yield Row(case=case.name, keeps=case.keeps, right=right, named=named, opinion=opinion)


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _interval(hits: int, n: int) -> tuple[float, float] | None:
    if not n:
        return None
    found: Any = importlib.import_module("scipy.stats").binomtest(hits, n).proportion_ci(CONFIDENCE)
    return float(found.low), float(found.high)


class Recorder:
    """Takes answers from another store, and keeps all of them in a `recorded.jsonl`."""

    def __init__(self, inner: Store, path: Path, model: str) -> None:
        self.inner, self.path, self.model = inner, path, model
        self.kept: set[str] = set()
        self._lock = threading.Lock()

    def get(self, key: str) -> Answer | None:
        answer = self.inner.get(key)
        if answer:
            self._keep(key, answer)
        return answer

    def put(self, key: str, answer: Answer) -> None:
        self.inner.put(key, answer)
        self._keep(key, answer)

    def _keep(self, key: str, answer: Answer) -> None:
        line = Recorded(key=key, model=self.model, date=datetime.date.today(), answer=answer)
        with self._lock:
            if key not in self.kept:
                self.kept.add(key)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line.model_dump_json() + "\n")

"""What is said about a program that no measurement tells: judges, their rule book, and what they answer.

A judge can deny a submission or flag it, as the tier says; nothing that it says can grant one.
"""

from __future__ import annotations

import datetime
import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from pydantic import Field, ValidationError

from nanogpt_env.errors import TierError
from nanogpt_env.tracks import Tier
from nanogpt_env.types import Opinion, Record, Track


class Rule(Record):
    """One rule of a book."""

    id: str
    since: datetime.date
    tracks: tuple[Track, ...] = ("steps", "wallclock")
    models: tuple[Literal["fixed", "free"], ...] = ("fixed", "free")
    """which model rule of a tier it is for"""
    forbids: str
    allows: str = ""
    """honest work that looks alike"""


class RuleBook(Record):
    """`rules.toml` of a judge's folder: the one place where its rules are written."""

    title: str
    about: dict[Track, str] = Field(default_factory=dict)
    """what a program is, for those who only see the book"""
    rules: tuple[Rule, ...]

    def of(self, track: Track, model_rule: str) -> RuleBook:
        """Those of a tier."""
        kept = tuple(r for r in self.rules if track in r.tracks and model_rule in r.models)
        about = {track: self.about[track]} if track in self.about else {}
        return self.model_copy(update={"rules": kept, "about": about})

    @property
    def date(self) -> datetime.date:
        """Of its last change."""
        return max(rule.since for rule in self.rules)

    def text(self) -> str:
        """For agents, judges and people alike."""
        lines = [f"{self.title}, as of {self.date}"]
        for rule in self.rules:
            lines.append(f"[{rule.id}] (since {rule.since}) Forbidden: {rule.forbids}")
            if rule.allows:
                lines.append(f"    Allowed: {rule.allows}")
        return "\n".join(lines)


@functools.cache
def read_rules(path: Path) -> RuleBook:
    """Raises `TierError`."""
    try:
        book = RuleBook(**tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, ValidationError) as error:
        raise TierError(f"{path} is no rule book: {error}") from None
    ids = [rule.id for rule in book.rules]
    if not ids or len(set(ids)) != len(ids):
        raise TierError(f"{path}: a rule book has rules, each with an id of its own")
    return book


class Material(Record):
    """What is judged: the sources that will run, beside those of the start record (file name -> text)."""

    tier: str
    track: Track
    model_rule: Literal["fixed", "free"] = "fixed"
    start: Mapping[str, str]
    sources: Mapping[str, str]

    @classmethod
    def of(cls, tier: Tier, sources: Mapping[str, str], start: str | None = None) -> Material:
        """start: the record that they are shown beside, by default the tier's own start."""
        record = tier.record(start or tier.table.reward.start)
        track, rule = tier.table.track, tier.model_rule
        return cls(tier=tier.name, track=track, model_rule=rule, start=record.sources, sources=sources)


@runtime_checkable
class Judge(Protocol):
    """A class of your own with these is one (docs/judges.md); `nanogpt_env.testing.check_judge` tries it."""

    name: str

    def rules(self, material: Material) -> RuleBook | None:
        """Those that it holds a program to, for agents to read; None if they are not in a book."""

    def judge(self, material: Material) -> Opinion:
        """Its opinion. Runs none of the code; does not raise for any sources."""

"""The cases of tests/attacks, and what is said of one that was run."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from nanogpt_env import content
from nanogpt_env.tiers import load_tier
from nanogpt_env.tracks import Tier
from nanogpt_env.types import Record

TIERS = {"steps": "nano-steps", "wallclock": "nano-wallclock", "free": "tiny-free", "submissions": "nano-steps"}
FILES = {
    "steps": "optimizer.py",
    "wallclock": "train.py",
    "free": "model.py",
    "submissions": "optimizer.py",
    "actions": "optimizer.py",
}
RESOURCES = ("memory", "disk", "log", "escape", "time", "threads")
Track = Literal["steps", "wallclock", "free", "submissions", "actions"]
Verdict = Literal["caught", "no effect", "bounded", "not applicable", "PASSED THROUGH", "honest", "REFUSED"]
BAD: tuple[Verdict, ...] = ("PASSED THROUGH", "REFUSED")
_BLOCK = re.compile(r"\A# /// attack\n((?:# .*\n)*?)# ///\n")


class Case(Record):
    """One candidate. `gains`: what it gets from the naive scorer: 'score', 'accepted', 'crash', an effect of the trap
    or a resource; empty for an honest control."""

    name: str
    track: Track
    idea: str
    source: str
    threats: tuple[str, ...]
    gains: str
    runs: int = 1
    needs: tuple[str, ...] = ()
    path: str = ""
    """of the file that an action writes; otherwise it is the candidate's"""
    times: int = 1
    """of an action as it comes in, how often its text is repeated"""
    tier: str = ""
    record: str = ""
    """whose source the candidate's follows"""
    claim: int | None = None
    naive: Literal["", "ten runs", "one run", "one pair"] = ""
    """how the naive scorer verifies a submission"""

    @property
    def honest(self) -> bool:
        return not self.gains

    @property
    def driver(self) -> str:
        """Of the naive scorer."""
        return "wallclock" if self.naive == "one pair" else "steps" if self.track in _BY_STEPS else self.track

    def load_tier(self, calibrated: bool = False) -> Tier:
        name = self.tier or TIERS[self.track]
        return load_tier(content.attack_content(name) if name.startswith("tiny-") else name, calibrated=calibrated)

    @property
    def file(self) -> str:
        return "train.py" if self.naive == "one pair" else FILES[self.track]

    def before(self) -> str:
        """Source of ours that the candidate's follows."""
        record = self.record or ("window-short" if self.track == "free" else "")
        return self.load_tier().record(record).sources[self.file] + "\n\n" if record else ""


_BY_STEPS = ("actions", "submissions")


class Outcome(Record):
    """What became of a case."""

    case: str
    threats: tuple[str, ...]
    verdict: Verdict
    detail: str
    naive: str = ""
    """what it got from the naive scorer; empty if it was not asked"""


class Measured(Record):
    """One run, by either scorer."""

    loss: float = math.inf
    seconds: float = math.inf
    log: str = ""
    effects: dict[str, str] = Field(default_factory=dict)
    left: int = 0
    ended: bool = True
    peak_bytes: int = 0
    written_bytes: int = 0
    exit_reason: str = "completed"


def load_cases() -> list[Case]:
    """All of tests/attacks. Raises `ValueError` on a file that has no block of settings."""
    folder = content.attack_content("attacks")
    actions = [load_action(path) for path in sorted((folder / "actions").glob("*.toml"))]
    return [*(load_case(path) for track in TIERS for path in sorted((folder / track).glob("*.py"))), *actions]


def load_action(path: Path) -> Case:
    settings = tomllib.loads(path.read_text(encoding="utf-8"))
    return Case(name=f"actions/{path.stem}", track="actions", source=settings.pop("text"), **settings)


def load_case(path: Path) -> Case:
    text = path.read_text(encoding="utf-8")
    block = _BLOCK.match(text)
    if not block:
        raise ValueError(f"{path} does not begin with an attack block")
    settings = tomllib.loads("".join(line[2:] for line in block[1].splitlines(keepends=True)))
    body = text[block.end() :]
    idea = body.split('"""')[1].split(" (Follows")[0]
    return Case(name=f"{path.parent.name}/{path.stem}", track=path.parent.name, idea=idea, source=body, **settings)


class Bounded(Record):
    """Something that is not stopped: what it gains at most, and what measured that."""

    name: str
    threats: tuple[str, ...]
    idea: str
    gain: str
    command: str
    results: str
    figures: tuple[tuple[str, ...], ...]
    """where the numbers of `gain` stand in the results"""

    def outcome(self) -> Outcome:
        return Outcome(case=f"bounded/{self.name}", threats=self.threats, verdict="bounded", detail=self.gain)


def load_bounded() -> list[Bounded]:
    path = content.attack_content("attacks") / "bounded.toml"
    settings: Mapping[str, dict[str, object]] = tomllib.loads(path.read_text(encoding="utf-8"))
    return [Bounded(name=name, **values) for name, values in settings.items()]

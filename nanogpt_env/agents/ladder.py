"""An agent that climbs the tier's own ladder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from nanogpt_env.actions import Action, EditFile, ReadFile, Run, Stop, Submit, WriteFile
from nanogpt_env.tables import HumanRecord
from nanogpt_env.tracks import StepsTier, Tier, WallclockTier

OVERCLAIM = 0.85
"""of the steps that a record needs: too few"""


class LadderAgent:
    """Climbs the tier's own ladder of human techniques by ordinary actions: the start record, a middle one,
    the anchor. On the way it claims too much once, which verification must refuse."""

    def __init__(self, tier: Tier) -> None:
        if isinstance(tier, StepsTier):
            self._script = _climb_steps(tier)
        else:
            assert isinstance(tier, WallclockTier)
            self._script = _climb_wallclock(tier)

    def act(self, observation: dict[str, Any], info: dict[str, Any]) -> Action:
        return next(self._script, Stop())


def _climb_steps(tier: StepsTier) -> Iterator[Action]:
    start, fastest, measured = tier.table.valued[0], tier.table.valued[-1], tier.measured.records
    sure = [n for n in tier.records if n in measured and measured[n].claim is not None and n not in (start, fastest)]
    middle = sure[len(sure) // 2 : len(sure) // 2 + 1]
    yield ReadFile(path="task.md")
    yield Run(horizon=tier.records[start].horizon)
    for name in (*middle, fastest):
        record = tier.records[name]
        yield from _write(record)
        yield Run(horizon=record.horizon)
        if name == fastest and name in measured:
            yield Submit(claim=round(OVERCLAIM * measured[name].steps_mean), horizon=record.horizon)
        claim = measured[name].claim if name in measured else None
        yield Submit(claim=claim or record.horizon, horizon=record.horizon)
    yield Stop()


def _climb_wallclock(tier: WallclockTier) -> Iterator[Action]:
    start, fastest = tier.table.valued[0], tier.table.valued[-1]
    others = [n for n in tier.records if n not in (start, fastest)]
    yield ReadFile(path="task.md")
    yield Run()
    for name in (*others[len(others) // 2 :][:1], fastest):
        yield from _write(tier.records[name])
        yield Run()
        if name == fastest and (steps := _STEPS.search(tier.records[name].sources["train.py"])):
            shorter = f"{steps[1]}{round(OVERCLAIM * int(steps[2]))}"
            yield EditFile(path="train.py", old=steps[0], new=shorter)
            yield Submit()
            yield EditFile(path="train.py", old=shorter, new=steps[0])
        yield Submit()
    yield Stop()


_STEPS = re.compile(r"^(STEPS = )(\d+)", re.MULTILINE)


def _write(record: HumanRecord) -> Iterator[Action]:
    for path, text in record.sources.items():
        yield WriteFile(path=path, text=text)

"""Agents that need no model. `play` runs one against an environment."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from nanogpt_env.actions import Action, EditFile, ReadFile, Run, Stop, Submit, WriteFile
from nanogpt_env.env import Speedrun
from nanogpt_env.errors import BackendError
from nanogpt_env.tables import HumanRecord
from nanogpt_env.tracks import StepsTier, Tier, WallclockTier

OVERCLAIM = 0.85
"""of the steps that a record needs: too few"""


class Agent(Protocol):
    """Sees an observation and info, answers with an action (a model, a dict or JSON text)."""

    def act(self, observation: dict[str, Any], info: dict[str, Any]) -> Any: ...


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


AGENTS: dict[str, Callable[[Tier], Agent]] = {"ladder": LadderAgent}


@dataclass
class Played:
    """What happened in an episode."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    """per action: type, text, reward"""
    runs: list[dict[str, Any]] = field(default_factory=list)
    """`info["run"]` of every finished run"""
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def total_reward(self) -> float:
        return float(sum(step["reward"] for step in self.steps))


def play(
    env: Speedrun,
    agent: Agent,
    on_step: Callable[[str, str, float], None] = lambda *_: None,
    on_action: Callable[[Any], None] = lambda action: None,
) -> Played:
    """One episode from `reset` to its end. `on_action(action)` is called before each action, `on_step(name, text,
    reward)` after it.

    Raises `BackendError` when our side fails: the agent here could only go on without its run."""
    played = Played()
    observation, info = env.reset()
    over = False
    while not over:
        action = agent.act(observation, info)
        on_action(action)
        observation, reward, terminated, truncated, info = env.step(action)
        if info.get("error") == "BackendError":
            raise BackendError(observation["text"])
        over = terminated or truncated
        name = env.history[-1][0]
        played.steps.append({"type": name, "text": observation["text"], "reward": reward})
        if info.get("run", {}).get("done"):
            played.runs.append({"snapshot": info["snapshot"], **info["run"]})
        if "verdict" in info:
            played.verdicts.append(info["verdict"])
        on_step(name, observation["text"], reward)
    played.info = info
    return played

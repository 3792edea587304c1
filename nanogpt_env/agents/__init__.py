"""Agents that need no model, and the loop that plays any agent. docs/agents.md shows how to write one."""

from __future__ import annotations

import inspect
import pkgutil
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from nanogpt_env.agents.ladder import LadderAgent
from nanogpt_env.agents.search import BayesAgent, BestOfAgent, GreedyAgent, HalvingAgent, RandomAgent, TreeAgent
from nanogpt_env.env import Speedrun
from nanogpt_env.errors import ActionError, AgentError, BackendError, NanoGPTError
from nanogpt_env.tracks import Tier


class Agent(Protocol):
    """Sees an observation and info, answers with an action (a model, a dict or JSON text)."""

    def act(self, observation: dict[str, Any], info: dict[str, Any]) -> Any: ...


AGENTS: dict[str, Callable[..., Agent]] = {
    "ladder": LadderAgent,
    "random": RandomAgent,
    "greedy": GreedyAgent,
    "best-of": BestOfAgent,
    "tree": TreeAgent,
    "halving": HalvingAgent,
    "bayes": BayesAgent,
}


def find_agent(name: str, options: Mapping[str, Any] | None = None) -> Callable[[Tier], Agent]:
    """By its name here, or as 'module:Class'; called with the tier it gives an agent. `options`: further arguments.

    Raises `ActionError` for a name that is none and for options that it does not take."""
    make = _find(name)
    try:
        inspect.signature(make).bind(None, **(options or {}))
    except TypeError as error:
        raise ActionError(f"agent {name!r}: {error}") from None
    return partial(make, **(options or {}))


def _find(name: str) -> Callable[..., Agent]:
    if name in AGENTS:
        return AGENTS[name]
    if ":" not in name:
        raise ActionError(f"no agent {name!r}: it is one of {', '.join(AGENTS)}, or module:Class")
    try:
        found: Callable[..., Agent] = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ActionError(f"agent {name!r} cannot be imported: {error}") from None
    return found


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
    resume: str | Path | None = None,
) -> Played:
    """One episode to its end, from `reset` or, with the folder of one that was left, from there. `on_action(action)` is
    called before each action, `on_step(name, text, reward)` after it. An agent that has a method `attach` gets the
    environment first, to fork it.

    Raises `BackendError` when our side fails, as the agent here could only go on without its run, and `AgentError`,
    caused by it, for whatever an agent raises."""
    played = Played()
    observation, info = env.resume(resume) if resume else env.reset()
    if attach := getattr(agent, "attach", None):
        attach(env)
    over = False
    while not over:
        action = _act(agent, observation, info)
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


def _act(agent: Agent, observation: dict[str, Any], info: dict[str, Any]) -> Any:
    try:
        return agent.act(observation, info)
    except NanoGPTError:
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise AgentError(f"the agent raised {error!r} ({at.filename}, line {at.lineno})") from error

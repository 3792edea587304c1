"""Several agents on one tier, at the same budget: episodes side by side, and what can be said of their difference.

Every episode is kept in a file as soon as it has ended, so that an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import json
import math
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from nanogpt_env.agents import AGENTS, find_agent, play
from nanogpt_env.env import Speedrun
from nanogpt_env.errors import LedgerError
from nanogpt_env.ledger import read_ledger
from nanogpt_env.scoring import recovered
from nanogpt_env.stats import mean_interval
from nanogpt_env.types import Record

CONFIDENCE = 0.95


class Entry(Record):
    """One episode of one agent."""

    agent: str
    episode: int
    tier: str
    fingerprint: str
    budget: dict[str, float]
    recovered: float
    curve: tuple[tuple[float, float], ...]
    """(device-seconds of runs and verifications so far, recovered), at each acceptance"""
    device_seconds: dict[str, float]
    """of runs by what they changed: 'repeated', 'numbers', 'algorithm'; and of 'verification'"""
    runs: dict[str, int]
    """by what they changed"""
    submissions: int
    accepted: int
    wall_seconds: float
    idle_seconds: float
    """of it outside of actions: the agent's own"""
    trusted: bool
    ledger: str
    """below the folder of the comparison"""


class Summary(Record):
    """Of one agent's episodes; `recovered` with the confidence interval of its mean."""

    agent: str
    episodes: int
    recovered: float
    interval: tuple[float, float] | None
    """None for a single episode"""
    best: float
    accepted: float
    submissions: float
    runs: dict[str, float]
    device_seconds: dict[str, float]
    wall_seconds: float
    idle_seconds: float


def compare(
    tier: str | Path,
    agents: Sequence[str],
    episodes: int,
    folder: Path,
    budget: Mapping[str, float],
    sandbox: str = "auto",
    at_once: int = 1,
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Entry]:
    """Play what is not in the folder yet, the agents in turn, `at_once` episodes at a time.

    Raises as an episode does."""
    makers = {name: find_agent(name) for name in agents}
    path = folder / "episodes.jsonl"
    free: queue.SimpleQueue[Speedrun] = queue.SimpleQueue()
    with ExitStack() as stack:
        # left in reverse: no further episode, an end to what is under way, then the threads that wait for it
        pool = stack.enter_context(ThreadPoolExecutor(at_once))
        for _ in range(at_once):
            env = Speedrun(tier, sandbox=sandbox, state_dir=folder, budget=budget)
            free.put(stack.enter_context(closing(env)))
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        known = {"tier": env.tier.name, "fingerprint": env.tier.fingerprint(), "budget": dict(budget)}
        kept = {(e.agent, e.episode): e for e in _read(path) if e.model_dump(include=set(known)) == known}
        wanted = [(name, number) for number in range(episodes) for name in makers]  # what drifts, drifts for all
        missing = [key for key in wanted if key not in kept]
        report("episodes", len(wanted) - len(missing), len(wanted))
        playing = [pool.submit(_play, free, name, makers[name], number, known) for name, number in missing]
        for done, future in enumerate(as_completed(playing), len(wanted) - len(missing) + 1):
            entry = future.result()
            folder.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(entry.model_dump_json() + "\n")
            kept[entry.agent, entry.episode] = entry
            report("episodes", done, len(wanted))
    return [kept[key] for key in wanted]


def _read(path: Path) -> list[Entry]:
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(Entry(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise LedgerError(
                f"{path} is not from a comparison of this version: {error}; choose another folder"
            ) from None
    return found


def _play(
    free: queue.SimpleQueue[Speedrun], name: str, make: Callable[[Any], Any], number: int, known: Mapping[str, Any]
) -> Entry:
    began, acting, at = time.monotonic(), 0.0, 0.0

    def on_action(_: Any) -> None:
        nonlocal at
        at = time.monotonic()

    def on_step(*_: Any) -> None:
        nonlocal acting
        acting += time.monotonic() - at

    env = free.get()
    try:
        env.agent_trusted = name in AGENTS
        played = play(env, make(env.tier), on_step, on_action)
    finally:
        free.put(env)
    wall = time.monotonic() - began
    ledger = Path(played.info["ledger"])
    return Entry(
        agent=name, episode=number, **known, **from_ledger(ledger), wall_seconds=wall, idle_seconds=wall - acting,
        ledger=f"{ledger.parent.name}/{ledger.name}",
    )  # fmt: skip


def from_ledger(path: Path) -> dict[str, Any]:
    """What an episode's ledger says about it: the fields of `Entry` that it has."""
    lines, _ = read_ledger(path)
    start, anchor = (float(lines[0][key]["value"]) for key in ("start", "anchor"))
    best, used, curve, trusted = start, 0.0, [], True
    seconds = dict.fromkeys(("repeated", "numbers", "algorithm", "verification"), 0.0)
    runs = dict.fromkeys(("repeated", "numbers", "algorithm"), 0)
    programs: list[tuple[str, str]] = []
    verdicts = []
    for line in lines:
        if line["kind"] == "run" and "error" not in line:
            program = line["shape"], line["snapshot"]
            kind = _change(program, programs)
            programs.append(program)
            runs[kind] += 1
            seconds[kind] += line["device_seconds"]
            used += line["device_seconds"]
            trusted = trusted and line["sandbox"]["trusted"]
        elif line["kind"] == "rerun":
            seconds["verification"] += line["device_seconds"]
            used += line["device_seconds"]
        elif line["kind"] == "verdict":
            verdicts.append(line)
            trusted = trusted and line["trusted"]
            if line["value"] is not None and line["value"] < best:
                best = line["value"]
                curve.append((used, recovered(start, anchor, best)))
    return {
        "recovered": recovered(start, anchor, best),
        "curve": tuple(curve),
        "device_seconds": seconds,
        "runs": runs,
        "submissions": len(verdicts),
        "accepted": sum(v["accepted"] for v in verdicts),
        "trusted": trusted,
    }


def _change(program: tuple[str, str], before: Sequence[tuple[str, str]]) -> str:
    if program in before:
        return "repeated"
    # the first program is the start record's, mostly: a run of that is no change
    return "numbers" if not before or program[0] in {shape for shape, _ in before} else "algorithm"


def summarize(entries: Sequence[Entry]) -> list[Summary]:
    """By agent, in their first order."""
    found = []
    for name in dict.fromkeys(e.agent for e in entries):
        own = [e for e in entries if e.agent == name]
        values = [e.recovered for e in own]

        def mean(of: Callable[[Entry], float], own: Sequence[Entry] = own) -> float:
            return sum(map(of, own)) / len(own)

        def means(of: Callable[[Entry], Mapping[str, float]], own: Sequence[Entry] = own) -> dict[str, float]:
            return {key: sum(of(e)[key] for e in own) / len(own) for key in of(own[0])}

        found.append(
            Summary(
                agent=name,
                episodes=len(own),
                recovered=math.fsum(values) / len(own),
                interval=mean_interval(values, CONFIDENCE) if len(own) > 1 else None,
                best=max(values),
                accepted=mean(lambda e: e.accepted),
                submissions=mean(lambda e: e.submissions),
                runs=means(lambda e: e.runs),
                device_seconds=means(lambda e: e.device_seconds),
                wall_seconds=mean(lambda e: e.wall_seconds),
                idle_seconds=mean(lambda e: e.idle_seconds),
            )
        )
    return found


def at(entry: Entry, seconds: float) -> float:
    """What an episode had recovered after so many device-seconds."""
    return max((value for used, value in entry.curve if used <= seconds), default=0.0)

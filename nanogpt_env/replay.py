"""Recompute every verdict and reward of a ledger from its reruns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanogpt_env import scoring
from nanogpt_env.errors import LedgerError
from nanogpt_env.ledger import VERSION, read_ledger
from nanogpt_env.stats import SequentialTest

TOLERANCE = 1e-9


@dataclass
class Replay:
    """What a ledger says, recomputed. `differences` is empty if it agrees with what was written."""

    tier: str
    best: float
    recovered: float
    total_reward: float
    submissions: list[dict[str, Any]] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """about the file itself: a torn line that was left out, an episode that has not ended"""


def replay(path: Path) -> Replay:
    """`path`: a ledger, or the folder of its episode. Raises `LedgerError` if it is no ledger of this version, or
    damaged."""
    path = path / "ledger.jsonl" if path.is_dir() else path
    lines, torn = read_ledger(path)
    if not lines or lines[0]["kind"] != "episode" or lines[0].get("version") != VERSION:
        raise LedgerError(f"{path} is not a version {VERSION} ledger: its first line must be an episode")
    try:
        return _replay(lines, torn)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise LedgerError(f"{path}: a line lacks or garbles what it must have: {error!r}") from None


def _replay(lines: list[dict[str, Any]], torn: str) -> Replay:
    head = lines[0]
    start, anchor, form = head["start"]["value"], head["anchor"]["value"], head["reward_form"]
    test = SequentialTest(**head["test"])
    out = Replay(head["tier"], best=start, recovered=0.0, total_reward=0.0, notes=[torn] if torn else [])
    losses: dict[str, list[float]] = {}
    offers: dict[str, dict[str, Any]] = {}
    for line in lines[1:]:
        name = line.get("submission", "")
        if line["kind"] == "submit":
            losses[name], offers[name] = [], line
        elif line["kind"] == "rerun":
            losses[name].append(math.inf if line["loss"] is None else float(line["loss"]))
        elif line["kind"] == "verdict":
            decision = test.decide(losses[name])
            if decision.outcome != ("accept" if line["accepted"] else "reject"):
                mine_is = "undecided" if decision.outcome == "continue" else f"{decision.outcome}ed"
                recorded = "accepted" if line["accepted"] else "rejected"
                out.differences.append(f"{name}: recorded {recorded}, recomputed {mine_is} after {decision.n} rerun(s)")
            mine = {"claim": offers[name]["claim"], "horizon": offers[name]["horizon"], "n": decision.n}
            out.differences += _differences(name, line, mine)
            before = out.best
            if decision.outcome == "accept":
                out.best = min(out.best, float(line["claim"]))
            reward = scoring.share(form, start, anchor, out.best) - scoring.share(form, start, anchor, before)
            out.total_reward += reward
            out.submissions.append(
                {
                    "submission": name,
                    "claim": line["claim"],
                    "horizon": line["horizon"],
                    "accepted": decision.outcome == "accept",
                    "n": decision.n,
                    "reward": reward,
                    "trusted": line["trusted"],
                }
            )
        elif line["kind"] == "reward":
            paid = out.submissions[-1]["reward"] if out.submissions else math.nan
            out.differences += _differences(name, line, {"reward": paid, "best": out.best})
        elif line["kind"] == "end":
            now = scoring.recovered(start, anchor, out.best)
            out.differences += _differences("end", line, {"best": out.best, "recovered": now})
    if lines[-1]["kind"] != "end":
        out.notes.append("the episode has no end: it is going on, or was cut off")
    out.recovered = scoring.recovered(start, anchor, out.best)
    return out


def _differences(name: str, line: dict[str, Any], mine: dict[str, float]) -> list[str]:
    return [
        f"{name}: recorded {key} {line[key]}, recomputed {value}"
        for key, value in mine.items()
        if not abs(value - line[key]) <= TOLERANCE
    ]

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
from nanogpt_env.timing import PairTest
from nanogpt_env.trials import FixedTrial, LossTrial, TimeTrial, Trial, Turn

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
    """`path`: a ledger, the folder of its episode, or one that holds this episode only. Raises `LedgerError` if it is
    no ledger of this version, or damaged."""
    path = _ledger(path) if path.is_dir() else path
    lines, torn = read_ledger(path)
    if not lines or lines[0]["kind"] != "episode" or lines[0].get("version") != VERSION:
        raise LedgerError(f"{path} is not a version {VERSION} ledger: its first line must be an episode")
    try:
        return _replay(lines, torn)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise LedgerError(f"{path}: a line lacks or garbles what it must have: {error!r}") from None


def _ledger(folder: Path) -> Path:
    found = sorted(folder.glob("*/ledger.jsonl"))
    if (folder / "ledger.jsonl").exists() or not found:
        return folder / "ledger.jsonl"
    if len(found) > 1:
        raise LedgerError(f"{folder} holds {len(found)} episodes; say which, such as {found[-1].parent}")
    return found[0]


def _replay(lines: list[dict[str, Any]], torn: str) -> Replay:
    head = lines[0]
    start, anchor, form = head["start"]["value"], head["anchor"]["value"], head["reward_form"]
    out = Replay(head["tier"], best=start, recovered=0.0, total_reward=0.0, notes=[torn] if torn else [])
    trials: dict[str, Trial] = {}
    offers: dict[str, dict[str, Any]] = {}
    vetoed: set[str] = set()
    for line in lines[1:]:
        name = line.get("submission", "")
        if line["kind"] == "submit":
            trials[name], offers[name] = _trial(head, line["claim"], start, out.best), line
        elif line["kind"] == "rerun":
            loss = math.inf if line["loss"] is None else float(line["loss"])
            turn = Turn(line["role"], line["session"])
            if turn != trials[name].turn():
                out.differences.append(
                    f"{name}: rerun {line['n']} is {turn}, but it was the turn of {trials[name].turn()}"
                )
            trials[name].add(turn, loss, line["train_seconds"])
        elif line["kind"] == "opinion" and (line["mode"], line["outcome"]) == ("veto", "break"):
            vetoed.add(name)
        elif line["kind"] == "verdict":
            out.differences += _check_verdict(name, line, trials[name], offers[name], name in vetoed)
            accepted, before = trials[name].outcome == "accept" and name not in vetoed, out.best
            if accepted:
                out.best = min(out.best, trials[name].value())
            reward = scoring.share(form, start, anchor, out.best) - scoring.share(form, start, anchor, before)
            out.total_reward += reward
            known = ("claim", "horizon", "trusted")
            more = {"accepted": accepted, "n": len(trials[name].losses), "reward": reward}
            out.submissions.append({"submission": name, **{key: line[key] for key in known}, **more})
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


def _trial(head: dict[str, Any], claim: int | None, start: float, best: float) -> Trial:
    if "fixed" in head["tests"]:
        return FixedTrial(**_whole(head["tests"]["fixed"], "runs"), start=start, best=best)
    loss_test = SequentialTest(**_whole(head["tests"]["loss"], "n_min", "n_max"))
    if head["track"] == "steps":
        return LossTrial(loss_test, float(claim or 0))
    return TimeTrial(loss_test, PairTest(**_whole(head["tests"]["pairs"], "pairs")), start, best)


def _whole(fields: dict[str, float], *names: str) -> dict[str, Any]:
    return fields | {name: int(fields[name]) for name in names}


def _check_verdict(name: str, line: dict[str, Any], trial: Trial, offer: dict[str, Any], vetoed: bool) -> list[str]:
    n, recorded = len(trial.losses), "accept" if line["accepted"] else "reject"
    if vetoed:
        ran = n or line["accepted"] or line["value"] is not None
        return [f"{name}: recorded {recorded}ed after {n} rerun(s), but a judge had vetoed it"] if ran else []
    if trial.outcome != recorded:
        mine_is = "undecided" if trial.outcome == "continue" else f"{trial.outcome}ed"
        return [f"{name}: recorded {recorded}ed, recomputed {mine_is} after {n} rerun(s)"]
    value = trial.value() if line["accepted"] else None
    found = _differences(name, line, {"claim": offer["claim"], "horizon": offer["horizon"], "n": n, "value": value})
    if trial.timing and line["time"]:
        return found + _differences(name, line["time"], trial.timing.model_dump())
    return found + ([f"{name}: recorded time {line['time']}"] if trial.timing or line["time"] else [])


def _differences(name: str, line: dict[str, Any], mine: dict[str, float | None]) -> list[str]:
    return [
        f"{name}: recorded {key} {line[key]}, recomputed {value}"
        for key, value in mine.items()
        if not (
            line[key] == value or (line[key] is not None and value is not None and abs(value - line[key]) <= TOLERANCE)
        )
    ]

"""Go on with an episode whose process has died, from its ledger and evidence.

What was reserved when it died counts as spent, as nobody knows what was: a run its whole reservation, a submission
without a verdict itself. So a crash never makes anything cheaper, and an undecided submission is no free draw of seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanogpt_env.backends import Backend
from nanogpt_env.budget import Budget, Reservation
from nanogpt_env.episode import AgentRun, Episode
from nanogpt_env.errors import ActionError, BackendError, LedgerError, TierError
from nanogpt_env.judging.panel import Panel, Spent
from nanogpt_env.ledger import VERSION, read_ledger
from nanogpt_env.tracks import Tier
from nanogpt_env.types import Opinion, Plan, Progress, RunResult, Verdict
from nanogpt_env.verify import Program, Submission
from nanogpt_env.workspace import normal_form

INTERRUPTED = "the process ended during this run, which is charged in full"


class Past:
    """The handle of a run of before."""

    def progress(self) -> Progress | None:
        return None

    def done(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> RunResult:
        raise BackendError(INTERRUPTED)

    def cancel(self) -> None:
        pass


def resume(
    folder: Path,
    tier: Tier,
    backend: Backend,
    snapshots: Mapping[str, Mapping[str, str]],
    agent_trusted: bool,
    panel: Panel,
) -> Episode:
    """The episode of this folder; `snapshots` are the files of its runs, by hash. Its agent is trusted if that of every
    process was. Raises `LedgerError` if it is in use, has ended, is damaged, or of another tier or version of it."""
    path = folder / "ledger.jsonl"
    lines, _ = read_ledger(path)
    if not lines or lines[0]["kind"] != "episode" or lines[0].get("version") != VERSION:
        raise LedgerError(f"{path} is not a version {VERSION} ledger")
    if lines[-1]["kind"] == "end":
        ended = f"the episode in {folder} has ended: {lines[-1].get('reason')}"
        raise LedgerError(f"{ended}; `nanogpt-env replay {folder}` says what it earned")
    episode = None
    try:
        episode = _opened(path, lines[0], tier, backend, panel)
        episode.agent_trusted = episode.agent_trusted and agent_trusted
        _Past(episode, snapshots).read(lines[1:])
    except BaseException as error:
        if episode:
            episode.ledger.close()
        if isinstance(error, (AttributeError, KeyError, TypeError, ValueError, OSError, TierError, ActionError)):
            raise LedgerError(f"{path}: a line, or the evidence, lacks what it must have: {error!r}") from None
        raise
    return episode


def _opened(path: Path, head: Mapping[str, Any], tier: Tier, backend: Backend, panel: Panel) -> Episode:
    if head["tier"] != tier.name:
        raise LedgerError(f"{path} is of tier {head['tier']}, not of {tier.name}")
    if head["fingerprint"] != tier.fingerprint():
        raise LedgerError(f"{path} is of tier {head['tier']} as it was: now its settings or calibration are others")
    if head["judges"] != [seat.model_dump() for seat in panel.seats]:
        had = ", ".join(f"{seat['name']}={seat['mode']}" for seat in head["judges"])
        raise LedgerError(f"{path} had other judges: {had or 'none'}")
    # it cannot be told when it died: at the latest when it last wrote
    budget = Budget(head["budget"], elapsed=max(0.0, path.stat().st_mtime - head["time"]))
    span = tier.span(head["start"]["record"], head["anchor"]["record"], head.get("human_only"))
    return Episode(tier, span, budget, backend, path.parent, head["episode"], head["agent_trusted"], panel)


class _Past:
    """Takes an episode through the lines of its ledger."""

    def __init__(self, episode: Episode, snapshots: Mapping[str, Mapping[str, str]]) -> None:
        self.episode, self.snapshots = episode, snapshots
        self.reserved: dict[str, dict[str, float]] = {}
        self.submitted: dict[str, dict[str, Any]] = {}
        self.reran: dict[str, float] = {}
        self.charged: set[str] = set()
        """submissions"""

    def read(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if take := getattr(self, "_" + line["kind"], None):
                take({key: value for key, value in line.items() if key not in ("seq", "kind")})
        self._settle()
        self.episode.ledger.append("resume", agent_trusted=self.episode.agent_trusted)

    def _settle(self) -> None:
        """Charge what nobody knows the use of."""
        episode = self.episode
        for handle, amounts in self.reserved.items():
            reservation = episode.budget.reserve({})
            episode._settle(handle, reservation, amounts)
            run = AgentRun(handle, "", "", "", None, 0, Past(), reservation, error=INTERRUPTED)
            episode.runs[handle] = run
            episode.ledger.append("run", handle=handle, error=INTERRUPTED)
        for name in self.submitted:
            if name not in self.charged:
                episode._settle(name, episode.budget.reserve({}), {"submissions": 1.0})
            episode.ledger.append("void", submission=name, evasive=False)

    def _resume(self, line: dict[str, Any]) -> None:
        self.episode.agent_trusted = self.episode.agent_trusted and line["agent_trusted"]

    def _reserve(self, line: dict[str, Any]) -> None:
        self.reserved[line["handle"]] = line["amounts"]

    def _charge(self, line: dict[str, Any]) -> None:
        self.reserved.pop(line["handle"], None)
        if line["used"].get("submissions"):
            self.charged.add(line["handle"])
        for meter, amount in line["used"].items():
            self.episode.budget.charge(meter, amount)

    def _run(self, line: dict[str, Any]) -> None:
        handle, reservation = line.pop("handle"), Reservation({})
        if error := line.get("error"):
            self.episode.runs[handle] = AgentRun(handle, "", "", "", None, 0, Past(), reservation, error=error)
            return
        snapshot, shape, horizon, seed = (line.pop(key) for key in ("snapshot", "shape", "horizon", "seed"))
        result = RunResult(**line)
        plan = Plan(steps=max(1, result.steps), horizon=horizon) if horizon else None
        program = normal_form(self.snapshots[snapshot]) if snapshot in self.snapshots else ""
        self.episode.runs[handle] = AgentRun(handle, program, shape, snapshot, plan, seed, Past(), reservation, result)

    def _submit(self, line: dict[str, Any]) -> None:
        self.submitted[line["submission"]] = line
        self.episode._submitted += 1

    def _rerun(self, line: dict[str, Any]) -> None:
        self.episode.budget.verification_device_seconds += line["device_seconds"]
        self.reran[line["submission"]] = self.reran.get(line["submission"], 0.0) + line["device_seconds"]

    def _opinion(self, line: dict[str, Any]) -> None:
        name = line["judge"]
        del line["submission"], line["mode"]
        self.episode.judge_spent.setdefault(name, Spent()).add(Opinion(**line))

    def _void(self, line: dict[str, Any]) -> None:
        self.submitted.pop(line["submission"], None)
        self.episode.evasions += line["evasive"]

    def _verdict(self, line: dict[str, Any]) -> None:
        verdict, episode = Verdict(**line), self.episode
        # with runs that were started and then not needed
        more = verdict.device_seconds - self.reran.get(verdict.submission, 0.0)
        episode.budget.verification_device_seconds += max(0.0, more)
        offer = self.submitted.pop(verdict.submission)
        evidence = json.loads((episode.folder / "evidence" / f"{verdict.submission}.json").read_text())
        plan = Plan(steps=offer["claim"], horizon=offer["horizon"]) if offer["horizon"] else None
        episode.remember(verdict, Submission(verdict.submission, offer["snapshot"], evidence["sources"], plan))
        if verdict.value is not None and verdict.value < episode.best:
            episode.frontier = Program(verdict.submission, evidence["sources"], verdict.value)

    def _action(self, _: dict[str, Any]) -> None:
        self.episode.budget.charge("episode_steps")

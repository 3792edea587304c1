"""One episode's account: budget, runs, verdicts, best score, ledger. Shared by an environment and its forks,
so that neither a restore nor a fork gives anything back."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from nanogpt_env import scoring
from nanogpt_env.actions import MAX_SEED
from nanogpt_env.backends import Backend, RunHandle
from nanogpt_env.backends.shared import host_secret
from nanogpt_env.budget import RUN_METERS, Budget, Reservation
from nanogpt_env.claims import ClaimAdvice, advise
from nanogpt_env.errors import ActionError, BackendError, BudgetError, JudgeError, JudgeUnavailable, LedgerError
from nanogpt_env.judging import Material
from nanogpt_env.judging.panel import Panel, Spent
from nanogpt_env.judging.static import judge_source
from nanogpt_env.ledger import VERSION, Ledger
from nanogpt_env.tracks import Span, StepsTier, Tier
from nanogpt_env.types import Opinion, Plan, Rerun, RunResult, Verdict
from nanogpt_env.verify import OnProgress, Program, Submission, verify
from nanogpt_env.workspace import normal_form

MIN_RUN_SECONDS = 1.0
FREE_EVASIONS = 2
POLL_S = 0.2


@dataclass
class AgentRun:
    """A run the agent asked for."""

    handle: str
    program: str
    """normal form of the sources"""
    shape: str
    """the same for programs that differ in numbers only"""
    snapshot: str
    plan: Plan | None
    seed: int
    """repeats the run; nothing about it tells of a verification seed"""
    process: RunHandle
    reservation: Reservation
    result: RunResult | None = None
    error: str = ""
    """set instead of `result` when our side failed; the run is then not charged"""


class Episode:
    """Begun by `begin`, or by `resume` from what it left. `folder` takes the ledger and the sealed evidence."""

    def __init__(
        self,
        tier: Tier,
        span: Span,
        budget: Budget,
        backend: Backend,
        folder: Path,
        name: str,
        agent_trusted: bool,
        panel: Panel,
    ) -> None:
        self.tier, self.span, self.budget, self.backend, self.panel = tier, span, budget, backend, panel
        self.id, self.folder, self.agent_trusted = name, folder, agent_trusted
        self.start_program = Program(span.start, tier.record(span.program).sources, span.start_value)
        self.frontier = self.start_program
        """the best verified program so far"""
        self.runs: dict[str, AgentRun] = {}
        self.verdicts: list[Verdict] = []
        self.judge_spent: dict[str, Spent] = {}
        self.evasions = 0
        """submissions that a judge answered about, but not usably"""
        self.over = ""
        self._steps, self._finished, self._left, self._lock = 0, False, False, threading.Lock()
        self._submitted = 0
        self._by_program: dict[tuple[str, Plan | None], Verdict] = {}
        self.ledger = Ledger(self.folder / "ledger.jsonl")

    @classmethod
    def begin(
        cls, tier: Tier, span: Span, budget: Budget, backend: Backend, state: Path, agent_trusted: bool, panel: Panel
    ) -> Episode:
        """A new one, in a folder of its own below `state`."""
        name = secrets.token_hex(8)
        folder = state / f"{time.strftime('%Y%m%dT%H%M%S')}-{tier.name}-{name}"
        self = cls(tier, span, budget, backend, folder, name, agent_trusted, panel)
        self.ledger.append(
            "episode",
            version=VERSION,
            episode=self.id,
            tier=tier.name,
            fingerprint=tier.fingerprint(),
            track=tier.table.track,
            start={"record": span.start, "value": span.start_value},
            anchor={"record": span.anchor, "value": span.anchor_value},
            human_only=span.human_only,
            reward_form=tier.table.reward.form,
            tests=tier.trial_fields(),
            budget=budget.limits,
            agent_trusted=agent_trusted,
            judges=[seat.model_dump() for seat in panel.seats],
            time=time.time(),
        )
        return self

    # --- scores ---

    @property
    def recovered(self) -> float:
        return scoring.recovered(self.span.start_value, self.span.anchor_value, self.best)

    @property
    def best(self) -> float:
        return self.frontier.value

    def _share(self, value: float) -> float:
        return scoring.share(self.tier.table.reward.form, self.span.start_value, self.span.anchor_value, value)

    @property
    def active(self) -> list[AgentRun]:
        return [r for r in self.runs.values() if r.result is None and not r.error]

    # --- runs ---

    def start_run(self, sources: Mapping[str, str], snapshot: str, plan: Plan | None, seed: int | None) -> AgentRun:
        """Judge, reserve, start. Raises `ActionError`, `BudgetError` or `BackendError`; nothing is charged then."""
        self.judge(sources)
        program = normal_form(sources)
        if len(self.active) >= self.tier.table.verification.slots:
            raise ActionError(f"all {self.tier.table.verification.slots} slot(s) are in use; poll or cancel a run")
        devices = max(1, self.tier.table.gpus)
        seconds = min(self.tier.table.limits.deadline_s, self.budget.left("device_seconds") / devices)
        if seconds < MIN_RUN_SECONDS:
            raise BudgetError("device_seconds: spent; you can still submit")
        seed = self._next_seed(program, plan) if seed is None else seed
        job = self.tier.job(sources, plan, f"agent/{seed}", (self.tier.table.data.public,))
        job = job.model_copy(update={"limits": job.limits.model_copy(update={"deadline_s": seconds})})
        amounts = {"device_seconds": seconds * devices, **self.tier.most(plan), "runs": 1.0}
        reservation = self.budget.reserve(amounts)
        handle = f"run-{len(self.runs) + 1}"
        try:
            self.ledger.append("reserve", handle=handle, amounts=amounts)
            process = self.backend.start(job, share=True)
        except BaseException:
            self._settle(handle, reservation, {})
            raise
        shape = normal_form(sources, numbers=False)
        run = AgentRun(handle, program, shape, snapshot, plan, seed, process, reservation)
        self.runs[handle] = run
        return run

    def _next_seed(self, program: str, plan: Plan | None) -> int:
        """Secret, new for each run of a program in an episode, and the same in all episodes on this host, so that they
        can share it."""
        before = sum(r.program == program and r.plan == plan for r in self.runs.values())
        digest = hashlib.sha256(
            f"{self.tier.fingerprint()} {program} {plan} {before}".encode() + host_secret()
        ).digest()
        return int.from_bytes(digest[:8], "big") % (MAX_SEED + 1)

    def wait(self, run: AgentRun, on_progress: OnProgress) -> None:
        """Wait for a run. Interrupted (Ctrl-C), it cancels and charges the run before it gives way."""
        try:
            while not run.process.done():
                on_progress("run", run.process)
                with contextlib.suppress(TimeoutError, BackendError):
                    run.process.result(POLL_S)
        except BaseException:
            self.cancel(run)
            raise
        self.collect()

    def cancel(self, run: AgentRun) -> None:
        run.process.cancel()
        with contextlib.suppress(BackendError):
            run.process.result()
        self.collect()

    def collect(self) -> None:
        """Settle every run that has ended."""
        for run in self.active:
            if run.process.done():
                self._finish(run)

    def _finish(self, run: AgentRun) -> None:
        try:
            run.result = run.process.result()
        except BackendError as error:  # our failure: the agent is not charged
            run.error = str(error)
            self._settle(run.handle, run.reservation, {})
            self.ledger.append("run", handle=run.handle, error=run.error)
            return
        r = run.result
        used = {"device_seconds": r.device_seconds, "flops": r.flops, "tokens": r.tokens, "runs": 1.0}
        self._settle(run.handle, run.reservation, used)
        # a point's loss may be inf or nan, which JSON does not have: null
        fields = json.loads(r.model_dump_json(exclude={"log", "train_losses"}))
        horizon = run.plan.horizon if run.plan else None
        known = {"snapshot": run.snapshot, "shape": run.shape, "horizon": horizon, "seed": run.seed}
        self.ledger.append("run", handle=run.handle, **known, **fields)

    def _settle(self, handle: str, reservation: Reservation, used: dict[str, float]) -> None:
        self.budget.settle(reservation, used)
        self.ledger.append("charge", handle=handle, used=used, spent={m: self.budget.spent(m) for m in RUN_METERS})

    def material(self, sources: Mapping[str, str]) -> Material:
        """What the judges are given: exactly these sources are run."""
        return Material.of(self.tier, sources, self.span.program)

    def judge(self, sources: Mapping[str, str]) -> None:
        """Raises `JudgeError` with the static judge's reasons."""
        for name, source in sources.items():
            if reasons := judge_source(source, name):
                text = "\n".join(f"- {r}" for r in reasons[:20])
                raise JudgeError(f"the static judge refuses {name}:\n{text}")

    # --- submissions ---

    def advice(self, sources: Mapping[str, str], horizon: int) -> ClaimAdvice:
        """Which claim the agent's runs of an update rule support. Raises `ActionError` on other tracks."""
        if not isinstance(self.tier, StepsTier):
            raise ActionError(f"tier {self.tier.name} has no claims")
        return advise(self.tier, self.completed_runs(normal_form(sources), horizon))

    def completed_runs(self, program: str, horizon: int | None) -> list[RunResult]:
        """The agent's completed runs of a program, of any horizon if None."""
        return [
            r.result
            for r in self.runs.values()
            if r.program == program and r.result and r.result.completed
            if horizon is None or (r.plan and r.plan.horizon == horizon)
        ]

    def last_horizon(self, sources: Mapping[str, str]) -> int | None:
        program = normal_form(sources)
        plans = [r.plan for r in self.runs.values() if r.program == program and r.result and r.result.completed]
        return plans[-1].horizon if plans and plans[-1] else None

    def submit(
        self,
        sources: Mapping[str, str],
        snapshot: str,
        plan: Plan | None,
        on_rerun: Callable[[Rerun], None],
        on_progress: OnProgress,
    ) -> tuple[Verdict, float]:
        """Verify and score: (verdict, reward). The same program with the same claim and horizon returns
        the verdict it had. If our side fails nothing is charged and `BackendError` is raised."""
        self.judge(sources)
        if known := self._by_program.get((normal_form(sources), plan)) or self._by_program.get((snapshot, plan)):
            return known.model_copy(update={"cached": True}), 0.0
        reservation = self.budget.reserve({"submissions": 1.0})
        self._submitted += 1  # a void one keeps its number
        submission = Submission(f"submission-{self._submitted}", snapshot, dict(sources), plan)
        claim, horizon = (plan.steps, plan.horizon) if plan else (None, None)

        def record(rerun: Rerun) -> None:
            known = {"n", "role", "session", "exit_reason", "loss", "train_seconds", "device_seconds"}
            fields = rerun.model_dump(include=known)
            self.ledger.append("rerun", submission=submission.id, **fields)
            on_rerun(rerun)

        def redone(n: int, error: str) -> None:
            self.ledger.append("redo", submission=submission.id, n=n, error=error)

        def used(seconds: float) -> None:
            self.budget.verification_device_seconds += seconds

        try:
            self.ledger.append("submit", submission=submission.id, snapshot=snapshot, claim=claim, horizon=horizon)
            opinions, veto = self._deliberate(submission, on_progress)
            if veto:
                verdict, evidence = vetoed(submission, veto)
            else:
                verdict, verified = verify(
                    self.tier, self.backend, submission, self.start_program, self.best, record, on_progress, redone,
                    used,
                )  # fmt: skip
                evidence = verified.model_dump()
            said = [opinion.model_dump() for opinion in opinions]
            seal(self.folder / "evidence" / f"{submission.id}.json", {**evidence, "opinions": said})
            verdict = verdict.model_copy(update={"opinions": tuple(opinions)})
        except BaseException as error:
            self._void(submission, reservation, error)
            raise
        self._settle(submission.id, reservation, {"submissions": 1.0})
        verdict = verdict.model_copy(update={"trusted": verdict.trusted and self.agent_trusted})
        self.ledger.append("verdict", **verdict.model_dump(exclude={"cached"}))
        self.remember(verdict, submission)
        return verdict, self._reward(verdict, submission)

    def _void(self, submission: Submission, reservation: Reservation, error: BaseException) -> None:
        """Undecided, and free if our side failed. An interruption is charged: an agent that can bring one about would
        look at the first reruns and begin anew until they please it. So is text that judges cannot answer about, after
        a few times."""
        evasive = isinstance(error, JudgeUnavailable) and error.reached
        self.evasions += evasive
        charged = not isinstance(error, Exception) or (evasive and self.evasions > FREE_EVASIONS)
        self._settle(submission.id, reservation, {"submissions": 1.0} if charged else {})
        self.ledger.append("void", submission=submission.id, evasive=evasive)

    def remember(self, verdict: Verdict, submission: Submission) -> None:
        """Measured ones by the program, denied ones by the very text: a comment can be what a judge denied."""
        self.verdicts.append(verdict)
        program = submission.snapshot if verdict.vetoed_by else normal_form(submission.sources)
        self._by_program[program, submission.plan] = verdict

    def _deliberate(self, submission: Submission, on_progress: OnProgress) -> tuple[list[Opinion], Opinion | None]:
        """(opinions, the one that denies). The judges have a thread: an interruption does not wait for them."""
        if not self.panel.seats:
            return [], None
        answer: Future[tuple[list[Opinion], Opinion | None]] = Future()
        said: SimpleQueue[tuple[Opinion, str]] = SimpleQueue()
        material = self.material(submission.sources)

        def ask() -> None:
            try:
                answer.set_result(self.panel.deliberate(material, self.judge_spent, lambda *opinion: said.put(opinion)))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=ask, daemon=True).start()
        while True:
            on_progress("the judges", None)
            with contextlib.suppress(TimeoutError):
                answer.exception(POLL_S)
            over = answer.done()
            while not said.empty():
                opinion, mode = said.get()
                self.ledger.append("opinion", submission=submission.id, mode=mode, **opinion.model_dump())
            if over:
                return answer.result()

    def _reward(self, verdict: Verdict, submission: Submission) -> float:
        before = self.best
        if verdict.value is not None and verdict.value < before:
            self.frontier = Program(submission.id, submission.sources, verdict.value)
        reward = self._share(self.best) - self._share(before)
        self.ledger.append(
            "reward",
            submission=verdict.submission,
            best=self.best,
            reward=reward,
            recovered=self.recovered,
            recovered_log=scoring.recovered_log(self.span.start_value, self.span.anchor_value, self.best),
        )
        return reward

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """While an action is being done the ledger stays open, whichever fork ends the episode meanwhile."""
        with self._lock:
            self._steps += 1
        try:
            yield
        finally:
            with self._lock:
                self._steps -= 1
            self._close()

    def end(self, reason: str) -> None:
        """Cancel what runs, charge it, close the ledger once no action is under way. Safe to call twice."""
        with self._lock:
            if self.over:
                return
            self.over = reason
        for run in self.active:
            run.process.cancel()
        for run in self.active:
            with contextlib.suppress(BackendError):
                run.process.result()
        self.collect()
        self._close()

    def leave(self) -> None:
        """Cancel what runs, charge it and close the ledger without an end: `resume` can go on with the episode."""
        self._left = True
        self.end("left")

    def _close(self) -> None:
        with self._lock:
            if not self.over or self._steps or self._finished:
                return
            self._finished = True
        try:
            if not self._left:
                fields = {"best": self.best, "recovered": self.recovered, "budget": self.budget.status()}
                self.ledger.append("end", reason=self.over, **fields)
        finally:
            self.ledger.close()


def vetoed(submission: Submission, veto: Opinion) -> tuple[Verdict, dict[str, Any]]:
    """(verdict, evidence) of what a judge denies: nothing was run."""
    plan, reason = submission.plan, f"rejected: vetoed by {veto.text()}"
    claim, horizon = (plan.steps, plan.horizon) if plan else (None, None)
    known = {"submission": submission.id, "claim": claim, "horizon": horizon, "accepted": False, "reason": reason}
    none = {"value": None, "n": 0, "coarse_loss": None, "device_seconds": 0.0, "trusted": True}
    verdict = Verdict(**known, **none, vetoed_by=veto.judge)
    return verdict, {**known, "snapshot": submission.snapshot, "sources": dict(submission.sources)}


def seal(path: Path, content: dict[str, Any]) -> None:
    """Write the evidence, readable by the operator only. Raises `LedgerError` and leaves no part of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(fd, "w") as file:
                json.dump(content, file, indent=1)
        except BaseException:
            path.unlink()
            raise
    except OSError as error:
        raise LedgerError(f"cannot write {path}: {error.strerror}") from None

"""Run a submission on fresh secret seeds until its trial has an outcome."""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nanogpt_env.backends import Backend, RunHandle
from nanogpt_env.errors import BackendError
from nanogpt_env.tracks import Tier
from nanogpt_env.trials import Trial, Turn
from nanogpt_env.types import Audit, Evidence, Plan, Rerun, RunResult, Verdict

COARSE_NATS = 0.005
POLL_S = 0.2

OnProgress = Callable[[str, RunHandle | None], None]
"""called a few times a second with a name for what is waited for and its handle, if it has one yet"""


@dataclass(frozen=True)
class Program:
    """Something that has a value: the start record, or an accepted submission."""

    name: str
    sources: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class Submission:
    """An immutable program with its claim."""

    id: str
    snapshot: str
    sources: Mapping[str, str]
    plan: Plan | None


@dataclass
class _Reruns:
    """Runs the turns of a trial in order of n. Where turns are all alike, up to `slots` of them run at a time."""

    tier: Tier
    backend: Backend
    submission: Submission
    start: Program
    on_redo: Callable[[int, str], None]
    running: dict[int, tuple[str, RunHandle]] = field(default_factory=dict)
    started: int = 0
    used_seconds: float = 0.0
    redone: set[int] = field(default_factory=set)

    def take(self, n: int, turn: Turn, ahead: int, on_progress: OnProgress) -> tuple[str, RunResult]:
        """Run n's (seed, result), with up to `ahead` runs started. A run that failed on our side, and only that, is
        redone once."""
        while len(self.running) < ahead:
            self.started += 1
            try:
                self.running[self.started] = self._start(turn)
            except BackendError as error:
                self.running[self.started] = self._redo(self.started, turn, error)
        what = _what(n, turn)
        try:
            result = self._wait(n, turn, what, on_progress)
        except BackendError as error:
            self.running[n] = self._redo(n, turn, error)
            result = self._wait(n, turn, what, on_progress)
        seed, _ = self.running.pop(n)  # not before: what interrupts the wait must find it, to cancel it
        self.used_seconds += result.device_seconds
        return seed, result

    def _wait(self, n: int, turn: Turn, what: str, on_progress: OnProgress) -> RunResult:
        handle = self.running[n][1]
        while True:
            on_progress(what, handle)
            with contextlib.suppress(TimeoutError):
                result = handle.result(POLL_S)
                break
        if turn.role != "candidate" and not result.completed:
            # the record is ours: no fault of the candidate's
            raise BackendError(f"{self.start.name} did not complete: {result.exit_reason}: {result.detail}")
        return result

    def _start(self, turn: Turn) -> tuple[str, RunHandle]:
        seed = secrets.token_hex(32)
        program = self.submission if turn.role == "candidate" else self.start
        job = self.tier.job(program.sources, self.submission.plan, seed, (self.tier.table.data.hidden,))
        return seed, self.backend.start(job)

    def _redo(self, n: int, turn: Turn, error: BackendError) -> tuple[str, RunHandle]:
        if n in self.redone:
            raise error
        self.redone.add(n)
        self.on_redo(n, str(error))
        return self._start(turn)

    def stop(self) -> None:
        for _, handle in self.running.values():
            handle.cancel()
        for _, handle in self.running.values():
            with contextlib.suppress(BackendError):
                self.used_seconds += handle.result().device_seconds
        self.running.clear()


def verify(
    tier: Tier,
    backend: Backend,
    submission: Submission,
    start: Program,
    best: float,
    on_rerun: Callable[[Rerun], None] = lambda rerun: None,
    on_progress: OnProgress = lambda what, handle: None,
    on_redo: Callable[[int, str], None] = lambda n, error: None,
    on_used: Callable[[float], None] = lambda seconds: None,
) -> tuple[Verdict, Evidence]:
    """Decide whether the program is what it claims: at the target within its claim (steps track), or at the target and
    of a better value than `best`, timed against the start record (wallclock track). A run of it that does not complete
    is a rejection.

    Raises `BackendError` if our side failed twice at one run, or the host is too unsteady to time anything; then
    nothing was decided. Calls `on_rerun` after each run, `on_redo(n, error)` before one is redone, and `on_used` with
    the device seconds of all of them in any case.
    """
    trial = tier.trial(submission.plan, start.value, best)
    queue = _Reruns(tier, backend, submission, start, on_redo)
    reruns: list[Rerun] = []
    try:
        result = _run(tier, backend, trial, queue, reruns, on_rerun, on_progress)
    finally:
        queue.stop()
        on_used(queue.used_seconds)
    if trial.outcome == "void":
        raise BackendError(f"{trial.reason}; nothing was decided: try again when less runs on this machine")
    accepted = trial.outcome == "accept"
    claim, horizon = (submission.plan.steps, submission.plan.horizon) if submission.plan else (None, None)
    evidence = Evidence(
        submission=submission.id,
        tier=tier.name,
        snapshot=submission.snapshot,
        sources=dict(submission.sources),
        claim=claim,
        horizon=horizon,
        start=start.name,
        best=best,
        tests=tier.trial_fields(),
        reruns=tuple(reruns),
        accepted=accepted,
        reason=trial.reason if result.completed else f"{result.exit_reason}: {result.detail}",
        time=trial.timing,
        z_statistic=_z_statistic(tier, trial.losses),
        sandbox=result.sandbox,
        versions=result.versions,
        hardware=result.hardware,
    )
    verdict = Verdict(
        accepted=accepted,
        value=trial.value() if accepted else None,
        claim=claim,
        horizon=horizon,
        n=len(trial.losses),
        reason=agent_reason(trial, result),
        coarse_loss=coarse(trial.losses),
        time=trial.timing,
        audit=_worst_audit(reruns),
        device_seconds=round(queue.used_seconds, 1),
        trusted=all(rerun.trusted for rerun in reruns),
        submission=submission.id,
    )
    return verdict, evidence


def _run(
    tier: Tier,
    backend: Backend,
    trial: Trial,
    queue: _Reruns,
    reruns: list[Rerun],
    on_rerun: Callable[[Rerun], None],
    on_progress: OnProgress,
) -> RunResult:
    """Run until the trial has an outcome; `reruns` takes what was run. Returns the last result."""
    v = tier.table.verification
    with contextlib.ExitStack() as session:
        if trial.turn().session:
            session.enter_context(backend.exclusive(lambda: on_progress("waiting for the whole machine", None)))
            session.callback(queue.stop)  # before anybody else may begin
        while True:
            turn, n = trial.turn(), len(reruns) + 1
            ahead = min(v.slots, v.n_max - len(trial.losses)) if trial.parallel else 1
            seed, result = queue.take(n, turn, ahead, on_progress)
            loss = result.val_losses[tier.table.data.hidden] if result.completed else math.inf
            trial.add(turn, loss, result.train_seconds)
            reruns.append(_rerun(n, turn, seed, result, loss, trial.losses, tier))
            on_rerun(reruns[-1])
            if trial.outcome != "continue":
                return result


def _what(n: int, turn: Turn) -> str:
    if not turn.session:
        return f"rerun {n}"
    return f"rerun {n} ({turn.role})"


def _rerun(n: int, turn: Turn, seed: str, result: RunResult, loss: float, losses: list[float], tier: Tier) -> Rerun:
    test = tier.loss_test()
    looked = turn.role == "candidate" and bool(losses) and all(map(math.isfinite, losses))
    threshold = test.threshold(len(losses)) if looked else math.inf
    return Rerun(
        n=n,
        role=turn.role,
        session=turn.session,
        seed=seed,
        exit_reason=result.exit_reason,
        detail=result.detail,
        trusted=result.sandbox.trusted,
        loss=loss if math.isfinite(loss) else None,
        audit=result.audits.get(tier.table.data.hidden) if turn.role == "candidate" else None,
        device_seconds=result.device_seconds,
        train_seconds=result.train_seconds,
        statistic=test.statistic(losses) if looked else None,
        threshold=threshold if math.isfinite(threshold) else None,
    )


def _z_statistic(tier: Tier, losses: list[float]) -> float | None:
    if not losses or not all(map(math.isfinite, losses)):
        return None
    test = tier.loss_test()
    return math.sqrt(len(losses)) * (test.target - sum(losses) / len(losses)) / test.futility_sd


def coarse(losses: list[float]) -> float | None:
    """Mean loss rounded to 0.005 nat: what an agent may learn about the hidden shard."""
    if not losses or not all(map(math.isfinite, losses)):
        return None
    return round(round(sum(losses) / len(losses) / COARSE_NATS) * COARSE_NATS, 3)


def _worst_audit(reruns: list[Rerun]) -> Audit | None:
    """With the losses as coarse as the agent may know them."""
    audits = [rerun.audit for rerun in reruns if rerun.audit]
    if not audits:
        return None
    worst = max(audits, key=lambda a: a.max_abs_d)
    losses = {name: coarse([getattr(worst, name)]) for name in ("claimed_loss", "audited_loss")}
    # one digit: the model has seen hidden text, and could write it into more
    return worst.model_copy(
        update=losses | {name: float(f"{getattr(worst, name):.0e}") for name in ("uncertainty", "mean_d", "max_abs_d")}
    )


def agent_reason(trial: Trial, last: RunResult) -> str:
    """A fixed sentence, so that no wording carries more than the decision."""
    if trial.outcome == "accept":
        return f"accepted: {trial.shown}"
    if not last.completed:
        return f"rejected: a rerun did not complete ({last.exit_reason})"
    return f"rejected: {trial.not_shown}"

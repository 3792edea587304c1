"""Rerun a submission on fresh secret seeds until the sequential test decides."""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from nanogpt_env.backends import Backend, RunHandle
from nanogpt_env.errors import BackendError
from nanogpt_env.stats import SequentialTest
from nanogpt_env.tiers import Tier
from nanogpt_env.types import Evidence, Rerun, RunResult, Verdict

COARSE_NATS = 0.005
POLL_S = 0.2

OnProgress = Callable[[int, RunHandle], None]
"""called a few times a second with the rerun's n and its handle"""


@dataclass(frozen=True)
class Submission:
    """An immutable program with its claim."""

    id: str
    snapshot: str
    source: str
    claim: int
    horizon: int


@dataclass
class _Reruns:
    """Keeps up to `slots` reruns going and hands their results out in order of n."""

    tier: Tier
    backend: Backend
    submission: Submission
    slots: int
    running: dict[int, tuple[str, RunHandle]] = field(default_factory=dict)
    started: int = 0
    used_seconds: float = 0.0
    redone: set[int] = field(default_factory=set)
    on_redo: Callable[[int, str], None] = lambda n, error: None

    def take(self, n: int, on_progress: OnProgress) -> tuple[str, RunResult]:
        """Rerun n's (seed, result). A rerun that failed on our side, and only that, is redone once."""
        while len(self.running) < self.slots and self.started < self.tier.table.verification.n_max:
            self.started += 1
            try:
                self.running[self.started] = self._start()
            except BackendError as error:
                self.running[self.started] = self._redo(self.started, error)
        try:
            result = _wait(self.running[n][1], n, on_progress)
        except BackendError as error:
            self.running[n] = self._redo(n, error)
            result = _wait(self.running[n][1], n, on_progress)
        seed, _ = self.running.pop(n)  # not before: what interrupts the wait must find it, to cancel it
        self.used_seconds += result.device_seconds
        return seed, result

    def _start(self) -> tuple[str, RunHandle]:
        seed = secrets.token_hex(32)
        s, shard = self.submission, self.tier.table.data.hidden
        return seed, self.backend.start(self.tier.job(s.source, s.claim, s.horizon, seed, (shard,)))

    def _redo(self, n: int, error: BackendError) -> tuple[str, RunHandle]:
        if n in self.redone:
            raise error
        self.redone.add(n)
        self.on_redo(n, str(error))
        return self._start()

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
    on_rerun: Callable[[Rerun], None] = lambda rerun: None,
    on_progress: OnProgress = lambda n, handle: None,
    on_redo: Callable[[int, str], None] = lambda n, error: None,
    on_used: Callable[[float], None] = lambda seconds: None,
) -> tuple[Verdict, Evidence]:
    """Decide whether the program reaches the target at its claim. Any rerun that does not complete is a
    rejection. Raises `BackendError` if our side failed twice at one rerun; then nothing was decided.

    Calls `on_rerun` after each rerun, `on_redo(n, error)` before one is redone, and `on_used` with the device
    seconds of all of them in any case.
    """
    test = tier.test()
    reruns: list[Rerun] = []
    losses: list[float] = []
    queue = _Reruns(tier, backend, submission, tier.table.verification.slots, on_redo=on_redo)
    try:
        while True:
            n = len(reruns) + 1
            seed, result = queue.take(n, on_progress)
            losses.append(result.val_losses[tier.table.data.hidden] if result.completed else math.inf)
            decision = test.decide(losses)
            reruns.append(_rerun(n, seed, result, losses, test))
            on_rerun(reruns[-1])
            if decision.outcome != "continue":
                break
    finally:
        queue.stop()
        on_used(queue.used_seconds)
    accepted = decision.outcome == "accept"
    reason = decision.reason if result.completed else f"{result.exit_reason}: {result.detail}"
    evidence = Evidence(
        submission=submission.id,
        tier=tier.name,
        snapshot=submission.snapshot,
        source=submission.source,
        claim=submission.claim,
        horizon=submission.horizon,
        test=_test_fields(test),
        reruns=tuple(reruns),
        accepted=accepted,
        reason=reason,
        z_statistic=math.sqrt(len(losses)) * (test.target - sum(losses) / len(losses)) / test.futility_sd
        if all(map(math.isfinite, losses))
        else None,
        sandbox=result.sandbox,
        versions=result.versions,
        hardware=result.hardware,
    )
    verdict = Verdict(
        accepted=accepted,
        claim=submission.claim,
        horizon=submission.horizon,
        n=len(reruns),
        reason=agent_reason(accepted, result),
        coarse_loss=coarse(losses),
        device_seconds=round(queue.used_seconds, 1),
        trusted=all(rerun.trusted for rerun in reruns),
        submission=submission.id,
    )
    return verdict, evidence


def _wait(handle: RunHandle, n: int, on_progress: OnProgress) -> RunResult:
    while True:
        on_progress(n, handle)
        with contextlib.suppress(TimeoutError):
            return handle.result(POLL_S)


def _rerun(n: int, seed: str, result: RunResult, losses: list[float], test: SequentialTest) -> Rerun:
    finite = all(map(math.isfinite, losses))
    threshold = test.threshold(n)
    return Rerun(
        n=n,
        seed=seed,
        exit_reason=result.exit_reason,
        detail=result.detail,
        trusted=result.sandbox.trusted,
        loss=losses[-1] if math.isfinite(losses[-1]) else None,
        device_seconds=result.device_seconds,
        statistic=test.statistic(losses) if finite else None,
        threshold=threshold if math.isfinite(threshold) else None,
    )


def _test_fields(test: SequentialTest) -> dict[str, float]:
    return {name: float(value) for name, value in vars(test).items()}


def coarse(losses: list[float]) -> float | None:
    """Mean loss rounded to 0.005 nat: what an agent may learn about the hidden shard."""
    if not all(map(math.isfinite, losses)):
        return None
    return round(round(sum(losses) / len(losses) / COARSE_NATS) * COARSE_NATS, 3)


def agent_reason(accepted: bool, last: RunResult) -> str:
    """A fixed sentence, so that no wording carries more than the decision."""
    if accepted:
        return "accepted: the reruns' mean loss is below the target"
    if not last.completed:
        return f"rejected: a rerun did not complete ({last.exit_reason})"
    return "rejected: the reruns do not show a mean loss below the target"

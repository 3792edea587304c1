"""Cases against one backend."""

from __future__ import annotations

import math
from pathlib import Path

from nanogpt_env.actions import WriteFile, parse_action
from nanogpt_env.attacks.cases import Case, Measured, Outcome, Verdict, load_cases
from nanogpt_env.attacks.naive import FASTER, MARGIN, STEPS, NaiveScorer, resource_used
from nanogpt_env.backends import Backend
from nanogpt_env.errors import ActionError, BackendError
from nanogpt_env.judging.static import judge_source
from nanogpt_env.trap import Trap
from nanogpt_env.types import Plan, RunResult
from nanogpt_env.verify import Program, Submission, verify
from nanogpt_env.workspace import Workspace

TRIES = 3


class Suite:
    """Cases against one backend. `ask_naive`: the naive scorer as well, on this host, outside of any sandbox."""

    def __init__(self, backend: Backend, trap: Trap, folder: Path, ask_naive: bool) -> None:
        self.backend, self.trap, self.ask_naive = backend, trap, ask_naive
        self.naive = NaiveScorer(trap, folder, ask_naive)
        self._control: dict[str, Measured] = {}

    def run(self, case: Case) -> Outcome:
        """Raises `BackendError` if the backend itself fails."""
        if missing := self.trap.missing & set(case.needs):
            return _outcome(case, "not applicable", f"there is no {', '.join(missing)} on this host")
        control = self._control.get(case.driver) or self._measure_control(case.driver)  # which unpacks the data, too
        told = self.naive.gain(case) if self.ask_naive and not case.honest else ""
        if case.track == "actions":
            return self._act(case, told)
        if case.track == "submissions":
            return self._submit(case, told)
        refused = judge_source(self.naive.source(case), case.file)
        for _ in range(case.runs - 1):
            self._train(case)
        measured = self._measure(case)
        verdict, detail = judge(case, measured, control)
        for _ in range(TRIES):
            if case.track != "wallclock" or not detail.startswith("score: "):
                break
            # of two runs a busy machine may slow down either: the fastest of some of both
            control = self._measure_control(case.driver, control.seconds)
            again = self._measure(case)
            measured = again.model_copy(update={"seconds": min(again.seconds, measured.seconds)})
            verdict, detail = judge(case, measured, control)
        if verdict in ("caught", "no effect") and refused:
            detail += f"; the static judge refuses it ({refused[0]})"
        return _outcome(case, verdict, detail, told)

    def _act(self, case: Case, told: str) -> Outcome:
        workspace = Workspace({"optimizer.py": ""}, {"task.md": ""}, 1 << 14)
        try:
            action = parse_action(self.naive.action(case))
            assert isinstance(action, WriteFile)
            workspace.write(action.path, action.text)
        except ActionError as error:
            return _outcome(case, "caught", f"refused: {str(error)[:200]}", told)
        return _outcome(case, "PASSED THROUGH", "it was written", told)

    def _submit(self, case: Case, told: str) -> Outcome:
        """Verified as in an episode, `TRIES` times if it is refused: what the same claim would get in further ones."""
        tier = case.load_tier(calibrated=True)
        start = tier.table.reward.start
        value = tier.start_value_of(start)
        program = Program(start, tier.record(start).sources, value)
        plan = tier.plan(None, case.claim) if case.claim else None
        for _ in range(1 if case.honest else TRIES):
            sources = {case.file: self.naive.source(case)}
            verdict, _ = verify(tier, self.backend, Submission(case.name, "", sources, plan), program, value)
            if verdict.accepted and case.honest:
                return _outcome(case, "honest", f"{verdict.n} reruns", told)
            if verdict.accepted:
                return _outcome(case, "PASSED THROUGH", verdict.reason, told)
        return _outcome(case, "REFUSED" if case.honest else "caught", f"{verdict.reason}; n = {verdict.n}", told)

    def _measure_control(self, track: str, seconds: float = math.inf) -> Measured:
        control = next(case for case in load_cases() if case.track == track and case.honest)
        measured = self._measure(control)
        if measured.exit_reason != "completed":
            raise BackendError(f"the honest control of {track} does not run: {measured.exit_reason}\n{measured.log}")
        self._control[track] = measured.model_copy(update={"seconds": min(measured.seconds, seconds)})
        return self._control[track]

    def _measure(self, case: Case) -> Measured:
        result = self._train(case)
        left, written = len(self.trap.left()), self.trap.written_bytes()
        return Measured(
            loss=next(iter(result.val_losses.values()), math.inf),
            seconds=result.train_seconds or math.inf,
            log=result.log,
            effects=self.trap.effects(result.log),
            left=left,
            written_bytes=written,
            peak_bytes=result.candidate_peak_bytes,
            exit_reason=result.exit_reason,
        )

    def _train(self, case: Case) -> RunResult:
        sources, tier = {case.file: self.naive.source(case)}, case.load_tier()
        if case.track == "free":
            sources["train.py"] = tier.record("window-short").sources["train.py"]
        plan = Plan(steps=STEPS, horizon=STEPS) if case.track == "steps" else None
        job = tier.job(sources, plan, "1", (tier.table.data.public,))
        limits = {"stall_s": 5.0, "setup_cpu_s": 30.0} if case.track != "steps" else {"stall_s": 5.0}
        job = job.model_copy(update={"limits": job.limits.model_copy(update=limits)})
        return self.backend.start(job).result(300)


def summary(outcomes: list[Outcome]) -> str:
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome.verdict] = counts.get(outcome.verdict, 0) + 1
    return f"{len(outcomes)} cases: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def judge(case: Case, measured: Measured, control: Measured) -> tuple[Verdict, str]:
    """What a run of a case says."""
    reached = dict(measured.effects)
    if measured.left:
        reached["left"] = f"{measured.left} processes were left"
    if used := resource_used(case.gains, measured):
        reached[case.gains] = used
    better = measured.loss < control.loss - MARGIN
    if case.track == "wallclock":  # where a better loss may be had by training longer: the clock counts that
        better = better and FASTER * measured.seconds < control.seconds
        better = better or (measured.seconds < FASTER * control.seconds and measured.loss < control.loss + MARGIN)
    if measured.exit_reason == "completed" and better:
        reached["score"] = f"loss {measured.loss:.3f} instead of {control.loss:.3f}, {measured.seconds:.2f} s"
    if reached:
        return "PASSED THROUGH", "; ".join(f"{name}: {text}" for name, text in reached.items())
    if case.honest:
        return ("honest", "") if measured.exit_reason == "completed" else ("REFUSED", measured.exit_reason)
    if measured.exit_reason != "completed":
        return "caught", measured.exit_reason
    compared = f"loss {measured.loss:.3f}, the control's is {control.loss:.3f}"
    if case.track == "wallclock":
        compared += f", in {measured.seconds / control.seconds:.1f} times its seconds"
    return "no effect", compared


def _outcome(case: Case, verdict: Verdict, detail: str, naive: str = "") -> Outcome:
    return Outcome(case=case.name, threats=case.threats, verdict=verdict, detail=detail, naive=naive)

"""What to run next in a verification, and what it says: the rules, without the running. Pure state; `verify.py` feeds
it with runs, `replay.py` with the lines of a ledger."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol

from nanogpt_env.stats import SequentialTest
from nanogpt_env.timing import PairDecision, PairTest, order
from nanogpt_env.types import Role, Timing

MAX_SESSIONS = 3
"""A session of pairs in which the start record's times drifted is repeated; after so many the host is too unsteady."""

Outcome = Literal["continue", "accept", "reject", "void"]


@dataclass(frozen=True)
class Turn:
    """The run that is wanted next. `session` is 0 for a run that nothing is timed against."""

    role: Role
    session: int = 0


class Trial(Protocol):
    """One verification. Ask `turn`, run it, `add` what came of it, until `outcome` is a decision."""

    losses: list[float]
    """hidden losses of the candidate's runs that the loss test looked at; inf for a run that did not complete"""

    @property
    def outcome(self) -> Outcome: ...

    @property
    def reason(self) -> str:
        """For the operator."""

    @property
    def shown(self) -> str:
        """For the agent, in fixed words: what an acceptance says."""

    @property
    def not_shown(self) -> str:
        """For the agent, in fixed words: what a rejection says."""

    @property
    def parallel(self) -> bool:
        """Whether further turns, all alike, may be taken before this one's result is known."""

    @property
    def timing(self) -> Timing | None: ...

    def turn(self) -> Turn: ...

    def add(self, turn: Turn, loss: float, seconds: float) -> None:
        """`loss` is inf, `seconds` anything, if the run did not complete."""

    def value(self) -> float:
        """What the program counts as, once accepted."""


@dataclass
class LossTrial:
    """Steps track: does the mean loss at the claim lie below the target?"""

    test: SequentialTest
    claim: float
    losses: list[float] = field(default_factory=list)
    parallel = True
    timing = None
    shown = "the reruns' mean loss is below the target"
    not_shown = "the reruns do not show a mean loss below the target"

    @property
    def outcome(self) -> Outcome:
        return self.test.decide(self.losses).outcome

    @property
    def reason(self) -> str:
        return self.test.decide(self.losses).reason

    def turn(self) -> Turn:
        return Turn("candidate")

    def add(self, turn: Turn, loss: float, seconds: float) -> None:
        self.losses.append(loss)

    def value(self) -> float:
        return self.claim


@dataclass
class TimeTrial:
    """Wallclock track: is it faster than the best program so far, and does its mean loss lie below the target? Each has
    a test of its own at the submission's level, and both must hold.

    It is timed against the start record, whose value is `start`, and must beat `best`: a candidate's former self is no
    reference, as it could be slow on purpose from some date on. The paired runs of the candidate serve both tests.
    Where they leave the loss open, further runs of the candidate decide it, in the same session: a program can tell
    the date, so every run whose loss counts is timed, and on average these may take no longer than what is paid. A void
    session says nothing on time; the losses of its runs count, but those of the session that does must lie below the
    target too. A run of the candidate that does not complete is a rejection.
    """

    loss_test: SequentialTest
    pair_test: PairTest
    start: float
    best: float
    losses: list[float] = field(default_factory=list)
    session: int = 1
    _warm: bool = False
    _candidate: list[float] = field(default_factory=list)
    _start: list[float] = field(default_factory=list)
    """training seconds of the session's paired runs"""
    _further: list[float] = field(default_factory=list)
    _session_losses: list[float] = field(default_factory=list)
    _time: PairDecision | None = None
    _no: str = ""
    """why it is rejected, where a single test does not say so"""
    parallel = False

    @property
    def shown(self) -> str:
        return "the runs' mean loss is below the target, and they are faster than the best so far"

    @property
    def not_shown(self) -> str:
        if self.loss_test.decide(self.losses).outcome == "reject":
            return "the runs do not show a mean loss below the target"
        if self._time is not None and self._time.faster:
            return "the runs that were timed and those that were good enough are not the same"
        return "the paired runs do not show that it is faster than the best so far"

    @property
    def outcome(self) -> Outcome:
        loss = self.loss_test.decide(self.losses).outcome
        if loss == "reject" or self._no:
            return "reject"
        if self.session > MAX_SESSIONS:
            return "void"
        if self._time is None:
            return "continue"
        return loss if self._time.faster else "reject"

    @property
    def reason(self) -> str:
        loss = self.loss_test.decide(self.losses)
        if self._no:
            return self._no
        if self.session > MAX_SESSIONS:
            return f"the start record's times moved too much in {MAX_SESSIONS} sessions"
        if loss.outcome == "reject" or self._time is None or self._time.faster:
            return loss.reason
        return self._time.reason

    @property
    def timing(self) -> Timing | None:
        if self._time is None:
            return None
        mean = math.fsum(self._candidate) / len(self._candidate)
        ratio, bound = (math.exp(x) * self._to_beat for x in (self._time.log_ratio, self._time.upper))
        return Timing(ratio=ratio, bound=bound, seconds=mean)

    def turn(self) -> Turn:
        if self._time is not None:
            return Turn("candidate", self.session)
        if not self._warm:  # a cold first run would be the start record's
            return Turn("warm-up", self.session)
        ours, theirs = len(self._candidate), len(self._start)
        candidates_turn = order(self.pair_test.pairs)[min(ours, theirs)][int(ours != theirs)]
        return Turn("candidate" if candidates_turn else "start", self.session)

    def add(self, turn: Turn, loss: float, seconds: float) -> None:
        if turn.role == "warm-up":
            self._warm = True
            return
        if turn.role == "start":
            self._start.append(seconds)
        else:
            if self.loss_test.decide(self.losses).outcome == "continue":
                self.losses.append(loss)
            self._session_losses.append(loss)
            if not math.isfinite(loss):
                self._no = "a run of the candidate has no finite loss"
                return
            (self._candidate if self._time is None else self._further).append(seconds)
        self._look()

    @property
    def _to_beat(self) -> float:
        """The best program's share of the start record's time, as far as it was shown."""
        return self.best / self.start

    def _look(self) -> None:
        if self._time is None:
            self._look_at_pairs()
        decided = self._time is not None and self.loss_test.decide(self.losses).outcome == "accept"
        if decided and self._time and self._time.faster:
            self._compare_all_runs(self._time)

    def _look_at_pairs(self) -> None:
        pairs, best = len(self._candidate), [seconds * self._to_beat for seconds in self._start]
        if pairs != len(best):
            return
        if pairs < self.pair_test.pairs:
            if self.pair_test.hopeless(self._candidate, best):
                self._no = f"not faster: given up after {pairs} of {self.pair_test.pairs} pairs"
            return
        decision = self.pair_test.decide(self._candidate, best)
        if decision.void:
            self.session, self._warm = self.session + 1, False
            self._candidate, self._start, self._session_losses = [], [], []
        else:
            self._time = decision

    def _compare_all_runs(self, time: PairDecision) -> None:
        """The runs that were timed must be those that are good enough, and the other way round."""
        if math.fsum(self._session_losses) / len(self._session_losses) >= self.loss_test.target:
            self._no = "the mean loss of the runs that were timed is not below the target"
        elif self._further:
            further, start = (sum(map(math.log, times)) / len(times) for times in (self._further, self._start))
            if further - start > time.upper + math.log(self._to_beat):
                self._no = "the further runs took longer than what the paired ones would be paid for"

    def value(self) -> float:
        assert self._time is not None
        return self.best * self._time.ratio


@dataclass
class FixedTrial:
    """Wallclock track, as NanoGPT-Bench decides: a fixed number of runs of the candidate and of the start record, in
    turn in one session; a one-sided t test of the candidate's mean loss; what counts is the ratio of mean times,
    without a bound for its error. For comparison with published figures: `TimeTrial` is the one that luck does not
    help. Stricter than there: a run that does not complete is a rejection, and equal losses are no test (p = 0 there).
    """

    runs: int
    p: float
    """level of the t test"""
    target: float
    """nats"""
    start: float
    best: float
    losses: list[float] = field(default_factory=list)
    _warm: bool = False
    _candidate: list[float] = field(default_factory=list)
    _start: list[float] = field(default_factory=list)
    parallel = False
    shown = "the runs' mean loss is below the target, and their mean time below that of the best so far"

    @property
    def not_shown(self) -> str:
        if not self._good():
            return "the runs do not show a mean loss below the target"
        return "the runs' mean time is not below that of the best so far"

    @property
    def outcome(self) -> Outcome:
        if not all(map(math.isfinite, self.losses)):
            return "reject"
        if len(self._candidate) < self.runs or len(self._start) < self.runs:
            return "continue"
        return "accept" if self._good() and self.value() < self.best else "reject"

    @property
    def reason(self) -> str:
        return self.shown if self.outcome == "accept" else self.not_shown

    @property
    def timing(self) -> Timing | None:
        if self.outcome == "continue" or len(self._candidate) < self.runs:
            return None
        ratio = self.value() / self.start
        return Timing(ratio=ratio, bound=ratio, seconds=math.fsum(self._candidate) / self.runs)

    def turn(self) -> Turn:
        if not self._warm:
            return Turn("warm-up", 1)
        ours, theirs = len(self._candidate), len(self._start)
        candidates_turn = order(self.runs)[min(ours, theirs)][int(ours != theirs)]
        return Turn("candidate" if candidates_turn else "start", 1)

    def add(self, turn: Turn, loss: float, seconds: float) -> None:
        if turn.role == "warm-up":
            self._warm = True
        elif turn.role == "start":
            self._start.append(seconds)
        else:
            self.losses.append(loss)
            self._candidate.append(seconds)

    def value(self) -> float:
        return self.start * math.fsum(self._candidate) / math.fsum(self._start)

    def _good(self) -> bool:
        from nanogpt_env.public_rules import t_test  # scipy takes long to load

        try:
            return t_test(self.losses, self.target)[1] < self.p
        except ValueError:  # too few, or all equal
            return False

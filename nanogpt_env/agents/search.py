"""Agents that search among the numbers of the start program: random, greedy, best of n, a tree, halving, Bayesian.

They differ in what they try next (`propose`, `rounds`); all run a program once, at a horizon at which the best so far
would just reach the target, and submit what promises to need clearly less than what has been accepted.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import random
import statistics
import warnings
from collections.abc import Generator, Iterator, Sequence
from importlib import util
from typing import Any

from nanogpt_env import literals
from nanogpt_env.actions import Action, Poll, Run, Stop, Submit, WriteFile
from nanogpt_env.env import Speedrun
from nanogpt_env.errors import ActionError
from nanogpt_env.tracks import StepsTier, Tier

SCALE = 0.4
"""nats that the loss falls by while the steps grow by a factor e, about: the records' curves have 0.27 to 0.62"""
MARGIN = 0.015
"""nats below the target that a submission should be"""
GAIN = 0.97
"""a submission should need at most this share of the best accepted"""
CONFIRMATIONS = 3
"""more runs of a program before a claim, at most"""
FIRST = 0.9
"""share of the start record's horizon that the first run has"""


def needed(size: float, above: float) -> float:
    """Steps (or time) to the target, by a run of `size` that ended so many nats `above` it."""
    return size * math.exp(min((above + MARGIN) / SCALE, 50.0))


Moves = tuple[float, ...]
Result = tuple[dict[str, Any], dict[str, Any]]
Script = Generator[Action, Result, Any]


@dataclasses.dataclass(frozen=True)
class Tried:
    """A program that was run. `need`: steps to the target, or the share of the start's seconds, as it looks."""

    moves: Moves
    source: str
    horizon: int | None
    loss: float
    need: float


class SearchAgent(abc.ABC):
    """What all searches share. `tried` holds every completed run."""

    spread = 0.5

    def __init__(self, tier: Tier, seed: int | None = None) -> None:
        self.tier, self.random = tier, random.Random(seed)
        self.file = tier.files[0]
        self.base = tier.record(tier.table.reward.start).sources[self.file]
        self.size = len(literals.find(self.base))
        self.tried: list[Tried] = []
        self.submitted: set[tuple[str, int | None]] = set()
        self.start_seconds = 0.0
        self._script = self.script()
        self._began = False

    def attach(self, env: Speedrun) -> None:
        """For searches that fork it."""
        self.env = env

    def act(self, observation: dict[str, Any], info: dict[str, Any]) -> Action:
        self.best_value = float(info["best"])
        try:
            if not self._began:
                self._began = True
                return next(self._script)
            return self._script.send((observation, info))
        except StopIteration:
            return Stop()

    def script(self) -> Script:
        yield from self.run((0.0,) * self.size)
        if self.tried:  # else there is nothing to compare with
            yield from self.search()
            yield from self.submit_if_better(last=True)

    @abc.abstractmethod
    def search(self) -> Script:
        """Try and submit until the budget allows no further run."""

    @property
    def best(self) -> Tried:
        """The last run of the program that needs least, by the mean of its runs."""
        return self.ranked()[0]

    def ranked(self) -> list[Tried]:
        """Of each program the last run, with its mean need; the best first."""
        by_moves: dict[Moves, list[Tried]] = {}
        for tried in self.tried:
            by_moves.setdefault(tried.moves, []).append(tried)
        means = [
            dataclasses.replace(runs[-1], need=statistics.geometric_mean(t.need for t in runs))
            for runs in by_moves.values()
        ]
        return sorted(means, key=lambda t: t.need)

    # --- parts of it ---

    def run(self, moves: Moves) -> Generator[Action, Result, bool]:
        """Train a program once; False when the budget does not allow it."""
        source = literals.moved(self.base, moves)
        yield WriteFile(path=self.file, text=source)
        horizon = self.horizon()
        _, info = yield Run(horizon=horizon)
        if info.get("error") == "BudgetError":
            return False
        if "run" in info:
            self.take(moves, source, horizon, info["run"])
        return True

    def horizon(self) -> int | None:
        """At which the best so far would just reach the target."""
        if not isinstance(self.tier, StepsTier):
            return None
        start = self.tier.record(self.tier.table.reward.start).horizon
        wanted = self.best.need if self.tried else FIRST * start
        return max(2, min(round(wanted), self.tier.table.training.max_horizon))

    def take(self, moves: Moves, source: str, horizon: int | None, run: dict[str, Any]) -> None:
        if run["exit_reason"] != "completed":
            return
        loss = run["val_losses"][self.tier.table.data.public]
        size = float(horizon or run["train_seconds"])
        if horizon is None:
            self.start_seconds = self.start_seconds or size  # the first run is the start program's
            size /= self.start_seconds
        self.tried.append(Tried(moves, source, horizon, loss, needed(size, loss - self.tier.table.training.target)))

    def submit_if_better(self, last: bool = False) -> Script:
        """Have the best program verified, if it looks good enough."""
        good = [t for t in self.tried if t.loss < self.tier.table.training.target - (0 if last else MARGIN)]
        new = [t for t in good if (t.source, t.horizon) not in self.submitted]
        best = min(new, key=lambda t: float(t.horizon or t.need), default=None)
        if not best or float(best.horizon or best.need) > GAIN * self.best_value:
            return
        self.submitted.add((best.source, best.horizon))
        yield WriteFile(path=self.file, text=best.source)
        for _ in range(CONFIRMATIONS):  # the best of many was lucky, mostly: more runs tell
            _, info = yield Run(horizon=best.horizon)
            if more := "run" in info:
                self.take(best.moves, best.source, best.horizon, info["run"])
            losses = [t.loss for t in self.tried if (t.source, t.horizon) == (best.source, best.horizon)]
            if sum(losses) / len(losses) > self.tier.table.training.target:
                return
            _, info = yield Submit(horizon=best.horizon)
            if not more or info.get("error") != "ActionError":
                return

    def near(self, moves: Moves, spread: float, count: int | None = None) -> Moves:
        """Some of the numbers, all by default, moved a little further."""
        chosen = self.random.sample(range(self.size), min(count or self.size, self.size))
        return tuple(m + self.random.gauss(0, spread) if i in chosen else m for i, m in enumerate(moves))


class ProposingAgent(SearchAgent):
    """Tries one program after the other."""

    @abc.abstractmethod
    def propose(self) -> Iterator[Moves]:
        """What to try, for ever."""

    def search(self) -> Script:
        for moves in self.propose():
            if not (yield from self.run(moves)):
                return
            yield from self.submit_if_better()


class RandomAgent(ProposingAgent):
    """Every number anywhere in its range, each time anew."""

    def propose(self) -> Iterator[Moves]:
        while True:
            yield tuple(self.random.uniform(-1, 1) for _ in range(self.size))


class GreedyAgent(ProposingAgent):
    """Two or three numbers of the best so far, moved: kept if that is better, else discarded."""

    spread = 0.4

    def propose(self) -> Iterator[Moves]:
        while True:
            yield self.near(self.best.moves, self.spread, self.random.choice((2, 3)))


class BayesAgent(ProposingAgent):
    """A Gaussian process of what programs need, tried where it expects to improve most (Optuna's `GPSampler`).

    Raises `ActionError` without Optuna and PyTorch."""

    anywhere = 6
    """programs that are tried before it is asked"""
    worst = 0.5
    """how much longer than the start program, on a log scale, one may look: what diverged would bend the surface"""

    def __init__(self, tier: Tier, seed: int | None = None) -> None:
        super().__init__(tier, seed)
        if not (util.find_spec("optuna") and util.find_spec("torch")):
            raise ActionError("the bayes agent needs Optuna and PyTorch: pip install 'nanogpt_env[agents,train]'")

    def propose(self) -> Iterator[Moves]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.GPSampler(
                seed=self.random.getrandbits(31), n_startup_trials=self.anywhere, deterministic_objective=False
            )
        study = optuna.create_study(sampler=sampler)
        first = math.log(self.best.need)
        space: dict[str, optuna.distributions.BaseDistribution] = {
            str(i): optuna.distributions.FloatDistribution(-1, 1) for i in range(self.size)
        }
        study.add_trial(optuna.create_trial(params=dict.fromkeys(space, 0.0), distributions=space, value=first))
        while True:
            trial = study.ask(space)
            before = len(self.tried)
            yield tuple(trial.params[name] for name in space)
            if len(self.tried) > before:
                study.tell(trial, min(math.log(self.tried[before].need), first + self.worst))
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)


class HalvingAgent(ProposingAgent):
    """Successive halving: many programs at a short schedule, the better third at one three times as long, and so on."""

    many, share = 9, 3

    def __init__(self, tier: Tier, seed: int | None = None) -> None:
        super().__init__(tier, seed)
        self.shorter, self.short = 1.0, list[Tried]()

    def propose(self) -> Iterator[Moves]:
        while True:
            found = [tuple(self.random.uniform(-1, 1) for _ in range(self.size)) for _ in range(self.many - 1)]
            bracket = [self.best.moves, *found]
            self.shorter = float(self.share ** round(math.log(self.many, self.share)))
            while len(bracket) > 1:
                before = len(self.short)
                yield from bracket
                ranked = sorted(self.short[before:], key=lambda t: t.need)
                bracket = [t.moves for t in ranked[: max(1, len(bracket) // self.share)]]
                self.shorter /= self.share
                if not bracket:
                    break
            self.shorter = 1.0
            yield from bracket

    def horizon(self) -> int | None:
        whole = super().horizon()
        return whole and max(2, round(whole / self.shorter))

    def take(self, moves: Moves, source: str, horizon: int | None, run: dict[str, Any]) -> None:
        """Short runs are compared with each other only: the estimate does not reach that far."""
        if self.shorter == 1.0 or horizon is None:
            super().take(moves, source, horizon, run)
            if horizon is None and self.tried:
                self.short.append(self.tried[-1])
        elif run["exit_reason"] == "completed":
            loss = run["val_losses"][self.tier.table.data.public]
            self.short.append(Tried(moves, source, horizon, loss, loss))


@dataclasses.dataclass(frozen=True)
class _Running:
    env: Speedrun
    moves: Moves
    source: str
    horizon: int | None
    run: dict[str, Any]


class ForkingAgent(SearchAgent):
    """Runs several programs at a time, each in a fork of the environment."""

    width = 4

    @abc.abstractmethod
    def rounds(self) -> Iterator[Sequence[Moves]]:
        """Programs to try together, round by round."""

    def search(self) -> Script:
        for together in self.rounds():
            if not self.run_together(together):
                return
            yield from self.submit_if_better()

    def run_together(self, together: Sequence[Moves]) -> bool:
        """False when the budget did not allow one of them."""
        running: list[_Running] = []
        allowed = True
        for moves in together:
            while allowed:
                fork, source, horizon = self.env.fork(), literals.moved(self.base, moves), self.horizon()
                fork.step(WriteFile(path=self.file, text=source))
                *_, info = fork.step(Run(horizon=horizon, wait=False))
                if "run" in info:
                    running.append(_Running(fork, moves, source, horizon, info["run"]))
                    break
                allowed = info["error"] != "BudgetError"
                if not running:
                    break
                self._finish(running.pop(0))  # for its slot
        for run in running:
            self._finish(run)
        return allowed

    def _finish(self, running: _Running) -> None:
        handle = running.run["handle"]
        running.env.episode.wait(running.env.episode.runs[handle], running.env.on_progress)
        run = running.env.step(Poll(handle=handle))[4]["run"]
        if "exit_reason" in run:
            self.take(running.moves, running.source, running.horizon, run)


class BestOfAgent(ForkingAgent):
    """The best of n variants of the best so far, all tried at a time."""

    def rounds(self) -> Iterator[Sequence[Moves]]:
        while True:
            yield [self.near(self.best.moves, self.spread) for _ in range(self.width)]


class TreeAgent(ForkingAgent):
    """The two best programs so far have two children each, whose changes are few."""

    parents = 2

    def rounds(self) -> Iterator[Sequence[Moves]]:
        while True:
            ranked = self.ranked()[: self.parents]
            children = self.width // len(ranked)
            yield [self.near(t.moves, self.spread, 2) for t in ranked for _ in range(children)]

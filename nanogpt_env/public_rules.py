"""The rules by which the public tables judge their rows, to judge them again. Ours for scored episodes is in `stats`.

Sources: the optimization track's README (target and pairwise rule), the short track's and NanoGPT-Bench (t test).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import special

from nanogpt_env.human import PublicRecord, PublicTable
from nanogpt_env.types import Record

TARGET = 3.28
"""nats"""
SLOPE = 0.0045
"""nats per 100 steps near the target, by which the pairwise rule makes rows of different steps comparable"""
_ROUNDING = 1e-9


class TargetRule(Record):
    """(target - mean) * sqrt(n) must reach `margin`. `sigma`: the run-to-run sd that the margin was made for, nats."""

    margin: float
    sigma: float

    def statistic(self, mean: float, n: int, target: float = TARGET) -> float:
        """Nats. Raises ValueError unless n >= 1."""
        if n < 1:
            raise ValueError(f"a mean is of at least one run, not {n}")
        return (target - mean) * math.sqrt(n)

    def passes(self, mean: float, n: int, target: float = TARGET) -> bool:
        # a row at the limit is published with few digits: floating point must not decide it
        return self.statistic(mean, n, target) >= self.margin - _ROUNDING

    def p(self, mean: float, n: int, target: float = TARGET) -> float:
        """Of a mean at the target and `sigma`, one-sided."""
        return float(special.ndtr(-self.statistic(mean, n, target) / self.sigma))


RULE = TargetRule(margin=0.004, sigma=0.0013)
FORMER_RULE = TargetRule(margin=0.005, sigma=0.0016)


class Group(NamedTuple):
    """Runs of one program: steps, mean loss (nats), how many."""

    steps: float
    mean: float
    n: int


def pairwise_statistic(old: Group, new: Group) -> float:
    """Nats by which `new` is better, per standard error's root: ((L_old - L_new) + (S_old - S_new) / 100 * SLOPE) over
    sqrt(1 / n_old + 1 / n_new); significant from the target rule's margin on."""
    gain = old.mean - new.mean + (old.steps - new.steps) / 100 * SLOPE
    return gain / math.sqrt(1 / old.n + 1 / new.n)


def pairwise_p(old: Group, new: Group, rule: TargetRule = RULE) -> float:
    return float(special.ndtr(-pairwise_statistic(old, new) / rule.sigma))


def t_test(losses: Sequence[float], target: float = TARGET) -> tuple[float, float]:
    """(t, one-sided p) that the mean is below the target; the short track asks for p < 0.01. Raises ValueError for
    fewer than two losses, or equal ones: then there is no such test (NanoGPT-Bench's code takes p for 0)."""
    if len(losses) < 2 or not (sd := statistics.stdev(losses)):
        raise ValueError("a t test needs losses that differ")
    t = (statistics.mean(losses) - target) * math.sqrt(len(losses)) / sd
    return t, float(special.stdtr(len(losses) - 1, t))


class Judged(Record):
    """A row judged again. `mark`: the table's own."""

    record: PublicRecord
    statistic: float
    passes: bool
    mark: bool | None

    @property
    def differs(self) -> bool:
        return self.mark is not None and self.mark != self.passes


def judge_again(table: PublicTable, rule: TargetRule = RULE) -> list[Judged]:
    """Every row that states runs and a mean loss."""
    found = []
    for r in table.records:
        if r.n_runs and r.mean_val_loss is not None:
            statistic = rule.statistic(r.mean_val_loss, r.n_runs, table.target_val_loss)
            passes = rule.passes(r.mean_val_loss, r.n_runs, table.target_val_loss)
            found.append(Judged(record=r, statistic=statistic, passes=passes, mark=r.statistically_valid))
    return found

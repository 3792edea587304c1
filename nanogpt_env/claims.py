"""Which claim an agent's own runs support."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nanogpt_env.stats import predicted_power, runs_to_tell
from nanogpt_env.tracks import StepsTier
from nanogpt_env.types import Record, RunResult

POWER = 0.9
WINDOW = 0.35
"""share of a run over which its curve is smoothed"""

Points = NDArray[np.float64]


class ClaimAdvice(Record):
    """`claim` is the smallest step likely to be accepted, or None with the reason in `text`."""

    claim: int | None
    power: float = 0.0
    hopeless: bool = False
    """true if no number of runs would make a claim likely to be accepted"""
    text: str


def curve(run: RunResult, shard: str) -> tuple[list[int], list[float]]:
    """(steps, losses): the evaluated steps of a completed run with their loss on the whole `shard`.

    Points see a small part of the shard; what part and whole differ by at the end shifts all of them. They also go up
    and down along a run (by 0.018 nat on nano-steps at high rates, docs/verification.md), so that the best of them is
    mostly the luckiest: each is replaced by a line through its neighbours, near ones weighing most (Cleveland 1979).
    """
    steps, losses = (np.array(x, dtype=float) for x in zip(*run.val_points, strict=True))
    away = np.abs(steps[:, None] - steps) / (WINDOW * steps[-1])
    finite = np.isfinite(losses)
    weights = np.clip(1 - away**3, 0, None) ** 3 * finite
    smooth = [_line_at(steps[i], steps, losses, weights[i]) if finite[i] else losses[i] for i in range(len(steps))]
    shift = run.val_losses[shard] - float(losses[-1])
    return [int(step) for step in steps], [float(loss) + shift for loss in smooth]


def _line_at(x: float, xs: Points, ys: Points, weights: Points) -> float:
    """The weighted least-squares line through points, at `x`."""
    near = weights > 0
    xs, ys, w = xs[near], ys[near], weights[near] / weights.sum()
    mean_x, mean_y = w @ xs, w @ ys
    spread = w @ (xs - mean_x) ** 2
    slope = w @ ((xs - mean_x) * (ys - mean_y)) / spread if spread > 0 else 0.0
    return float(mean_y + slope * (x - mean_x))


def advise(tier: StepsTier, runs: Sequence[RunResult]) -> ClaimAdvice:
    """The smallest claim whose predicted power is at least 0.9, given completed runs of the candidate at
    one horizon. The runs saw the public shard: its calibrated offset is taken off, and how much that
    offset varies from run to run makes each run count for less."""
    if not runs:
        return ClaimAdvice(claim=None, text="no completed run of this program at this horizon; run it first")
    test, c, shard = tier.loss_test(), tier.measured, tier.table.data.public
    information = c.sigma**2 / (c.sigma**2 + c.shard_offset_sd**2)
    first = max(min(curve(r, shard)[0]) for r in runs)
    runs = [r for r in runs if r.steps >= first]  # one that stopped before says nothing about a common step
    first = max(min(curve(r, shard)[0]) for r in runs)
    last = min(r.steps for r in runs)
    steps = np.arange(first, last + 1)
    losses = np.mean([np.interp(steps, *curve(r, shard)) for r in runs], axis=0) - c.shard_offset
    # where a run diverged its loss may be inf, and nan between that and the next point
    margins = np.where(np.isnan(losses), -np.inf, tier.table.training.target - losses)

    def power(margin: float) -> float:
        return predicted_power(test, float(margin), c.sigma, len(runs) * information)

    ordered = np.sort(margins)  # power rises with the margin
    enough = bisect.bisect_left(ordered, POWER, key=power)
    if enough < len(ordered):
        i = int(np.argmax(margins >= ordered[enough]))
        text = f"claim {steps[i]}: predicted power {power(margins[i]):.2f} from {len(runs)} run(s)"
        return ClaimAdvice(claim=int(steps[i]), power=power(margins[i]), text=text)
    best = int(np.argmax(margins))
    needed = runs_to_tell(test, float(margins[best]), c.sigma, POWER)
    if needed is None:
        text = (
            f"the predicted loss at step {steps[best]} leaves a margin of {margins[best]:+.4f} nat to the target; "
            f"no number of runs makes that likely to be accepted. Improve the rule or lengthen the horizon"
        )
    else:
        more = max(1, math.ceil(needed / information) - len(runs))
        text = f"{more} more run(s) at this horizon would tell whether step {steps[best]} can be claimed"
    return ClaimAdvice(claim=None, hopeless=needed is None, text=text)

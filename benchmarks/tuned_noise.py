"""Loss distributions made for the test: how often does a program pass whose mean loss is not below the target?

    python benchmarks/tuned_noise.py [--paths 400000]

A program may choose its own noise: it may be good nine times in ten and bad otherwise, or vary more or less than honest
ones do. Here it knows the test, and its losses are exactly at the target in the mean: good ones lie `gap` sigma below
it with sd `sd` sigma, a share `bad` of them above, as far as the mean asks for. What counts is how much oftener than
its level one submission is accepted, and how often one of the eight of an episode is. By how much a program that
passes is good for less than it is paid: `gap` sigma in nats; in steps, that over the slope of the loss at the target.

Writes benchmarks/results/tuned-noise.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_env.stats import SequentialTest, decide_paths
from nanogpt_env.tiers import load_tier

RESULTS = Path(__file__).parent / "results" / "tuned-noise.json"
BAD = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
GAPS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
SDS = (0.1, 0.5, 1.0, 2.0)
CHUNK = 50_000


def accepted(test: SequentialTest, sigma: float, bad: float, gap: float, sd: float, paths: int) -> tuple[float, float]:
    """Share of submissions that are accepted, and its standard error."""
    rng = np.random.default_rng([int(1000 * x) for x in (bad, gap, sd)])
    passed = 0
    for _ in range(paths // CHUNK):
        losses = sd * rng.standard_normal((CHUNK, test.n_max))
        if bad:
            # the mean of all is the target: (1 - bad) * -gap + bad * above = 0
            above = gap * (1 - bad) / bad
            losses += np.where(rng.random(losses.shape) < bad, above, -gap)
        passed += int(decide_paths(test, test.target + sigma * losses)[0].sum())
    share = passed / paths
    return share, (share * (1 - share) / paths) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tier", default="nano-steps")
    parser.add_argument("--paths", type=int, default=400_000)
    args = parser.parse_args()
    tier = load_tier(args.tier)
    test, submissions = tier.loss_test(), tier.table.budget.submissions
    sigma = test.futility_sd
    rows: list[dict[str, Any]] = []
    for bad, gap, sd in itertools.product(BAD, GAPS, SDS):
        if not bad and gap != GAPS[0]:
            continue  # without bad runs there is no gap
        share, error = accepted(test, sigma, bad, gap, sd, args.paths)
        episode = 1 - (1 - share) ** submissions
        rows.append({"bad": bad, "gap": gap if bad else 0.0, "sd": sd, "accepted": share, "error": error,
                     "of_an_episode": episode, "over_level": share / tier.level()})  # fmt: skip
    rows.sort(key=lambda row: -row["accepted"])
    gaussian = next(row for row in rows if not row["bad"])
    worst = {str(gap): next(row for row in rows if row["gap"] == gap) for gap in GAPS}
    nine = {gap: next(row for row in rows if row["bad"] == 0.1 and row["gap"] == float(gap)) for gap in worst}
    found = {
        "command": f"python benchmarks/tuned_noise.py --tier {args.tier} --paths {args.paths}",
        "tier": args.tier, "sigma": sigma, "level": tier.level(), "submissions": submissions,
        "gaussian": gaussian, "nine_in_ten": nine, "worst_by_gap": worst, "rows": rows,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for name, row in {
        "no bad runs": gaussian,
        **worst,
        **{f"nine/ten {gap}": row for gap, row in nine.items()},
    }.items():
        print(f"{name:12} {row}")


if __name__ == "__main__":
    main()

"""What isolation costs: the same rule in-process against isolated, one step of each in turn.

    python benchmarks/handoff.py [--tier nano-steps] [--record normuon] [--steps 150] [--repeats 5]

Prints a table and writes benchmarks/results/handoff-TIER.json. Ratios are of medians over the steps of a repeat; the
spread is over repeats. Both trainings start from the same seed, so their losses are compared as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from in_process import InProcessRule  # first: it makes the trainer importable

from nanogpt_env.content import content_root
from nanogpt_env.tiers import Tier, load_tier

import sandbox
from logs import BoundedLog
from rule import IsolatedRule, Rule
from trainer import Job, Result
from training import Training


def repeat(tier: Tier, source: str, steps: int, seed: str) -> dict[str, float]:
    """Both trainings, alternating step by step: median milliseconds of each and the largest loss difference."""
    job = Job(**tier.job(source, steps, steps, seed, (tier.table.data.public,)).model_dump())
    log = BoundedLog()
    process = sandbox.launch("bubblewrap", [content_root()], log.write_fd)
    log.close_writer()
    try:
        ours, theirs = (Training(job, Result(), lambda: False) for _ in range(2))
        rules: tuple[Rule, Rule] = (
            InProcessRule(ours, source, steps, job.stream_seed("rule")),
            IsolatedRule(process, theirs.flat, source, steps, job.stream_seed("rule"), theirs.limits),
        )
        times: tuple[list[float], list[float]] = ([], [])
        losses: tuple[list[float], list[float]] = ([], [])
        for step in range(steps):
            for i in (0, 1) if step % 2 else (1, 0):  # who goes first alternates, for the caches' sake
                training, rule = (ours, theirs)[i], rules[i]
                began = time.perf_counter()
                loss, seconds = training.forward_backward()
                rule.step(step, seconds)
                times[i].append(time.perf_counter() - began)
                losses[i].append(loss)
    finally:
        process.kill()
    in_process, isolated = (statistics.median(t[5:]) for t in times)
    return {
        "in_process_ms": 1e3 * in_process,
        "isolated_ms": 1e3 * isolated,
        "ratio": isolated / in_process,
        "max_loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tier", default="nano-steps")
    parser.add_argument("--record", default="normuon")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])  # the first optimizer imports torch's compiler: not a step's cost
    tier = load_tier(args.tier, calibrated=False)
    source = tier.record(args.record).source
    rows = []
    for i in range(args.repeats):
        rows.append(repeat(tier, source, args.steps, f"handoff-{i}"))
        print("  ".join(f"{k} {v:.4g}" for k, v in rows[-1].items()), flush=True)
    ratios = [row["ratio"] for row in rows]
    result = {
        "command": f"python benchmarks/handoff.py --tier {args.tier} --record {args.record} "
        f"--steps {args.steps} --repeats {args.repeats}",
        "overhead_percent_mean": 100 * (statistics.mean(ratios) - 1),
        "overhead_percent_sd": 100 * statistics.stdev(ratios),
        "max_loss_difference": max(row["max_loss_difference"] for row in rows),
        "n": len(rows),
        "torch": torch.__version__,
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / f"handoff-{args.tier}-{args.record}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{args.tier} {args.record}: isolation adds {result['overhead_percent_mean']:.2f} % of a step "
        f"(sd {result['overhead_percent_sd']:.2f}, n = {len(rows)}), largest loss difference "
        f"{result['max_loss_difference']:.1e} nat; wrote {path}"
    )


if __name__ == "__main__":
    main()

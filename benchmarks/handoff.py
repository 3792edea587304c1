"""What isolation costs: the same rule in-process against isolated, one step of each in turn.

    python benchmarks/handoff.py [--tier nano-steps] [--record normuon] [--steps 60] [--repeats 20]

Prints a line per repeat and writes benchmarks/results/handoff-TIER-RECORD.json. Two figures: `overhead_percent`, the
ratio of whole steps, whose spread over repeats is mostly where the two models came to lie in memory; and
`handoff_percent`, the parts of it that can be measured alone: copies with system calls, and the waiting beyond the
rule's own CPU time. Times are medians over the steps of a repeat. Both trainings start from the same seed, so their
losses are compared as well.
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
from nanogpt_env.tiers import load_tier
from nanogpt_env.tracks import StepsTier
from nanogpt_env.types import Plan

import sandbox
from logs import BoundedLog
from rule import IsolatedRule, Rule
from trainer import Result, StepsJob
from training import Training


class TimedRule(IsolatedRule):
    """Says what each part of a hand-off takes."""

    def step(self, step: int, forward_backward_s: float) -> None:
        waited, cpu, began = self.line.waited, self.line.cpu_seconds(), time.perf_counter()
        super().step(step, forward_backward_s)
        took, waited = time.perf_counter() - began, self.line.waited - waited
        rule = self.line.cpu_seconds() - cpu
        self.parts = {"copies": took - waited, "wake_ups": waited - rule, "rule": rule}


def repeat(tier: StepsTier, source: str, steps: int, number: int) -> dict[str, float]:
    """Both trainings, alternating step by step: median milliseconds and the largest loss difference."""
    plan, shards = Plan(steps=steps, horizon=steps), (tier.table.data.public,)
    job = StepsJob(**tier.job({"optimizer.py": source}, plan, f"handoff-{number}", shards).model_dump())
    log = BoundedLog()
    process = sandbox.launch("bubblewrap", [content_root()], log.write_fd)
    log.close_writer()
    process.wait_loaded()
    try:
        # which model was made first alternates: where it lies in memory moves its time by several percent
        ours, theirs = (Training(job, Result(), lambda: False) for _ in range(2))
        if number % 2:
            ours, theirs = theirs, ours
        in_process = InProcessRule(ours, source, steps, job.stream_seed("rule"))
        isolated = TimedRule(process, theirs.flat, source, steps, [job.stream_seed("rule")], theirs.limits)
        times: dict[str, list[float]] = {k: [] for k in ("in_process", "isolated", "copies", "wake_ups", "rule")}
        losses: dict[str, list[float]] = {"in_process": [], "isolated": []}
        both: list[tuple[str, Training, Rule]] = [
            ("in_process", ours, in_process),
            ("isolated", theirs, isolated),
        ]
        for step in range(steps):
            for name, training, rule in both if step % 2 else both[::-1]:  # for the caches' sake
                began = time.perf_counter()
                loss, seconds = training.forward_backward()
                rule.step(step, seconds)
                times[name].append(time.perf_counter() - began)
                losses[name].append(loss)
            for part, took in isolated.parts.items():
                times[part].append(took)
    finally:
        process.kill()
    ms = {f"{name}_ms": 1e3 * statistics.median(column[5:]) for name, column in times.items()}
    return {
        **ms,
        "overhead_percent": 100 * (ms["isolated_ms"] / ms["in_process_ms"] - 1),
        "handoff_percent": 100 * (ms["copies_ms"] + ms["wake_ups_ms"]) / ms["in_process_ms"],
        "max_loss_difference": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tier", default="nano-steps")
    parser.add_argument("--record", default="normuon")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])  # the first optimizer imports torch's compiler: not a step's cost
    tier = load_tier(args.tier, calibrated=False)
    assert isinstance(tier, StepsTier)
    source = tier.record(args.record).sources["optimizer.py"]
    rows = []
    for i in range(args.repeats):
        rows.append(repeat(tier, source, args.steps, i))
        print("  ".join(f"{k} {v:.4g}" for k, v in rows[-1].items()), flush=True)
    figures = {}
    for key in ("overhead_percent", "handoff_percent"):
        column = [row[key] for row in rows]
        figures[key] = {"mean": statistics.mean(column), "sd": statistics.stdev(column), "n": len(column)}
    result = {
        "command": f"python benchmarks/handoff.py --tier {args.tier} --record {args.record} "
        f"--steps {args.steps} --repeats {args.repeats}",
        **figures,
        "max_loss_difference": max(row["max_loss_difference"] for row in rows),
        "torch": torch.__version__,
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / f"handoff-{args.tier}-{args.record}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for key, figure in figures.items():
        print(f"{key}: {figure['mean']:.2f}, sd {figure['sd']:.2f}, n = {figure['n']}")
    print(f"largest loss difference {result['max_loss_difference']:.1e} nat; wrote {path}")


if __name__ == "__main__":
    main()

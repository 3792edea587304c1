"""Seed noise of a record at its calibrated claim: spread, shape, and whether batches of seeds agree with each other.

    python benchmarks/seed_noise.py [--tier nano-steps] [--record normuon] [--step 142] [--runs 100] [--order rows]

Verification assumes independent Gaussian losses. The seeds are run in batches of ten; if they are independent, the
variance of the batches' means is a tenth of the variance of single losses, and `overdispersion`, their ratio, is 1.
`--order contiguous` cuts a batch out of one piece of text instead (docs/design/data-order.md).
Writes benchmarks/results/seed-noise-TIER-RECORD-STEP-ORDER.json, with all losses.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from in_process import InProcessRule  # first: it makes the trainer importable
from scipy import stats

from nanogpt_env.tiers import load_tier
from nanogpt_env.tracks import StepsTier
from nanogpt_env.types import Plan

import data
from trainer import Result, StepsJob
from training import Training

BATCH = 10


class Contiguous(data.Batches):
    """Batches as FineWeb scripts cut them: rows follow each other in the text."""

    def _in_stream(self, length: int) -> int:
        self._next = 0  # all rows from one cursor
        return super()._in_stream(length)


def hidden_loss(task: tuple[str, str, int, str, str]) -> float:
    name, record_name, step, seed, order = task
    torch.set_num_threads(1)
    tier = load_tier(name, calibrated=False)
    assert isinstance(tier, StepsTier)
    record, hidden = tier.record(record_name), tier.table.data.hidden
    plan = Plan(steps=step, horizon=record.horizon)
    job = StepsJob(**tier.job(record.sources, plan, seed, (hidden,)).model_dump())
    training = Training(job, result := Result(), lambda: False)
    if order == "contiguous":
        training.batches.__class__ = Contiguous
    rule = InProcessRule(training, job.source, record.horizon, job.stream_seed("rule"))
    training.evaluate_all(training.train_with(rule, lambda: None))
    return result.val_losses[hidden]


def summary(losses: list[float]) -> dict[str, float]:
    x = np.array(losses)
    means = x[: len(x) // BATCH * BATCH].reshape(-1, BATCH).mean(axis=1)
    n = len(x)
    return {
        "n": n,
        "mean": float(x.mean()),
        "mean_error": float(x.std(ddof=1) / n**0.5),
        "sd": float(x.std(ddof=1)),
        "sd_error": float(x.std(ddof=1) / (2 * (n - 1)) ** 0.5),
        "skew": float(stats.skew(x, bias=False)),
        "excess_kurtosis": float(stats.kurtosis(x, bias=False)),
        "shapiro_p": float(stats.shapiro(x).pvalue),
        "overdispersion": float(BATCH * means.var(ddof=1) / x.var(ddof=1)),
        "overdispersion_error": (2 / (len(means) - 1)) ** 0.5,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tier", default="nano-steps")
    parser.add_argument("--record", default="normuon")
    parser.add_argument("--step", type=int, help="default: the claim at which its value was measured")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--order", choices=("rows", "contiguous"), default="rows")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    measured = load_tier(args.tier).measured.evidence["values"].get(args.record)
    step = args.step or measured["claim"]
    tasks = [(args.tier, args.record, step, secrets.token_hex(16), args.order) for _ in range(args.runs)]
    losses = []
    with get_context("spawn").Pool(args.workers) as pool:
        for loss in pool.imap(hidden_loss, tasks):
            losses.append(loss)
            if len(losses) % BATCH == 0:
                print(
                    f"{len(losses)} of {args.runs}: mean of these ten {statistics.mean(losses[-BATCH:]):.4f}",
                    flush=True,
                )
    result: dict[str, Any] = {
        "command": f"python benchmarks/seed_noise.py --tier {args.tier} --record {args.record} --step {step} "
        f"--runs {args.runs} --order {args.order}",
        **summary(losses),
        "seeds": [task[3] for task in tasks],
        "losses": [round(x, 6) for x in losses],
        "torch": torch.__version__,
    }
    if measured and step == measured["claim"]:
        result["calibrated"] = {k: measured[k] for k in ("n", "loss_mean", "loss_sd")}
    path = Path(__file__).parent / "results" / f"seed-noise-{args.tier}-{args.record}-{step}-{args.order}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k not in ("losses", "seeds")}, indent=1))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

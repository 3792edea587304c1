"""Runs a minute of 1, 2, 4 and 8 environments on one host, against the ideal: every core training all the time.

    python benchmarks/throughput.py [--runs 4] [--record adamw]

Each environment is a process of its own, as in AsyncVectorEnv, and asks for `--runs` runs one after the other: all
different (own seeds), or all the same (no seed given: identical ones are trained once). The ideal: every core trains
all the time, at the seconds a run takes alone, measured before. Writes benchmarks/results/throughput.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def play(tier: str, record: str, runs: int, first_seed: int | None, gate: Any, answers: Any) -> None:
    from nanogpt_env import Run, Speedrun, WriteFile

    env = Speedrun(tier)
    env.reset()
    for name, text in env.tier.record(record).sources.items():
        env.step(WriteFile(path=name, text=text))
    gate.wait()
    seconds = []
    for i in range(runs):
        began = time.monotonic()
        *_, info = env.step(Run(seed=None if first_seed is None else first_seed + i))
        if info.get("error") or info["run"]["exit_reason"] != "completed":
            raise SystemExit(str(info))
        seconds.append(time.monotonic() - began)
    answers.put(seconds)
    env.close()


def wall(tier: str, record: str, environments: int, runs: int, same: bool) -> tuple[float, list[float]]:
    """(seconds until all are through, seconds of each run) from when every environment is ready."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["NANOGPT_ENV_CACHE"] = cache
        context = multiprocessing.get_context("spawn")
        gate, answers = context.Barrier(environments + 1), context.Queue()
        workers = [
            context.Process(target=play, args=(tier, record, runs, None if same else 1000 * i, gate, answers))
            for i in range(environments)
        ]
        for worker in workers:
            worker.start()
        gate.wait()
        began = time.monotonic()
        seconds = [s for _ in workers for s in answers.get(timeout=1800)]
        took = time.monotonic() - began
        for worker in workers:
            worker.join()
    return took, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tier", default="nano-steps")
    parser.add_argument("--record", default="adamw-groups")
    parser.add_argument("--runs", type=int, default=4)
    args = parser.parse_args()
    _, seconds = wall(args.tier, args.record, 1, args.runs, same=False)
    one, cores, rows = statistics.mean(seconds), len(os.sched_getaffinity(0)), []
    for environments in (1, 2, 4, 8):
        for same in (False, True):
            took, _ = wall(args.tier, args.record, environments, args.runs, same)
            trained = args.runs if same else environments * args.runs
            # one environment asks for one run after the other, and so can keep one core busy
            ideal = trained * one / min(cores, 1 if same else environments)
            rows.append(
                {
                    "environments": environments,
                    "identical": same,
                    "runs_a_minute": 60 * environments * args.runs / took,
                    "share_of_ideal": ideal / took,
                    "seconds": took,
                }
            )
            print(
                "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()),
                flush=True,
            )
    command = "python benchmarks/throughput.py " + " ".join(f"--{k} {v}" for k, v in vars(args).items())
    content = {"command": command, "cores": cores, "seconds_of_one_run_alone": seconds, "rows": rows}
    (RESULTS / "throughput.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Verified episodes per core-hour on nano-steps, against the naive way, with each factor's share.

    python benchmarks/episodes.py [--environments 4] [--repeats 1]

An episode: a run of the start record, the same in all; two runs of the candidate, with seeds of their own; and a
submission. Candidates are one program at claims whose margins follow the mix of benchmarks/false_accepts.py, 70 %
bad, 20 % near and 10 % good, in units of sigma. The ways add up: the naive one starts a process for each run, whenever
an environment asks for it, and reruns each submission ten times; then runs wait for a core of their own (slots), start
from a warm process, are rerun until the sequential test knows, and identical ones are trained once. Verdicts are
counted where there are any. Writes benchmarks/results/episodes.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import secrets
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_env import Run, Speedrun, Submit, WriteFile
from nanogpt_env.actions import Action
from nanogpt_env.backends import Backend
from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.backends.queued import Queued
from nanogpt_env.backends.shared import Shared
from nanogpt_env.tracks import StepsTier

RESULTS = Path(__file__).parent / "results"
RECORD, START = "adamw-groups", "adamw"
SLOPE = 0.0028
"""nats a step by which the record's loss falls around the target (its curves in calibration.json)"""
FIXED = 10
# margins in sigma, negative where the claim is too low: the middles of equal parts of each class of the mix
BAD, NEAR, GOOD = (0.002, 0.015), (-0.001, 0.001), (0.0015, 0.005)
MARGINS = [
    *(-x / 0.0013 for x in np.linspace(*BAD, 15)[1::2]),
    *(x / 0.0013 for x in np.linspace(*NEAR, 5)[1::2]),
    sum(GOOD) / 2 / 0.0013,
]
WAYS = ("naive", "slots", "warm", "sequential", "shared")


def backend_of(way: str) -> Backend:
    step = WAYS.index(way)
    local = LocalBackend("auto", warm=step >= WAYS.index("warm"))
    if way == "naive":
        return local
    queued = Queued(local, owner=secrets.token_hex(4))
    return Shared(queued, local.kind) if way == "shared" else queued


def episode(env: Speedrun, way: str, margin: float, number: int) -> bool | None:
    """Play it; whether the submission was accepted, if the way decides that."""
    tier = env.tier
    assert isinstance(tier, StepsTier)
    env.reset()
    do(env, Run(horizon=tier.record(START).horizon, seed=7))
    record = tier.record(RECORD)
    claim = round(tier.measured.records[RECORD].steps_mean + margin * tier.measured.sigma / SLOPE)
    do(env, WriteFile(path="optimizer.py", text=record.sources["optimizer.py"]))
    for i in (1, 2):
        do(env, Run(horizon=record.horizon, seed=1000 * number + i))
    if WAYS.index(way) >= WAYS.index("sequential"):
        return bool(do(env, Submit(claim=claim, horizon=record.horizon))["verdict"]["accepted"])
    plan = tier.plan(record.horizon, claim)
    for _ in range(FIXED):
        job = tier.job(record.sources, plan, secrets.token_hex(32), (tier.table.data.hidden,))
        if not env.episode.backend.start(job).result().completed:
            raise SystemExit("a rerun did not complete")
    return None


def do(env: Speedrun, action: Action) -> dict[str, Any]:
    observation, *_, info = env.step(action)
    if info.get("error") or info.get("run", {}).get("exit_reason", "completed") != "completed":
        raise SystemExit(observation["text"])
    return info


def work(way: str, tasks: Any, answers: Any, folder: str) -> None:
    with closing(Speedrun("nano-steps", backend=backend_of(way), state_dir=folder)) as env:
        while (task := tasks.get()) is not None:
            margin, number = task
            answers.put(episode(env, way, margin, number))


def play(way: str, environments: int) -> dict[str, Any]:
    """All episodes of the mix, so many at a time."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NANOGPT_ENV_CACHE"] = f"{folder}/cache"
        context = multiprocessing.get_context("spawn")
        tasks, answers = context.Queue(), context.Queue()
        # nobody knows beforehand which take long
        order = np.random.default_rng(0).permutation(len(MARGINS))
        for number in order:
            tasks.put((MARGINS[number], int(number)))
        workers = [context.Process(target=work, args=(way, tasks, answers, folder)) for _ in range(environments)]
        began = time.monotonic()
        for worker in workers:
            worker.start()
            tasks.put(None)
        accepted = [answers.get(timeout=7200) for _ in MARGINS]
        took = time.monotonic() - began
        for worker in workers:
            worker.join()
    return {"way": way, "seconds": took, "accepted": sum(map(bool, accepted))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--environments", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    cores, rows = len(os.sched_getaffinity(0)), list[dict[str, Any]]()
    for _ in range(args.repeats):
        for way in WAYS:
            rows.append(play(way, args.environments))
            rows[-1]["episodes_per_core_hour"] = 3600 * len(MARGINS) / rows[-1]["seconds"] / cores
            print(rows[-1], flush=True)
    naive = sum(row["seconds"] for row in rows if row["way"] == "naive")
    before = naive
    for way in WAYS:
        seconds = sum(row["seconds"] for row in rows if row["way"] == way)
        print(f"{way}: {naive / seconds:.2f} times the naive way, {before / seconds:.2f} by itself")
        before = seconds
    command = "python benchmarks/episodes.py " + " ".join(f"--{k} {v}" for k, v in vars(args).items())
    known = {"command": command, "cores": cores, "episodes": len(MARGINS), "rows": rows}
    (RESULTS / "episodes.json").write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()

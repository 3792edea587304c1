"""Verified episodes per core-hour on nano-steps, against the naive way, with each factor's share.

    python benchmarks/episodes.py [--environments 4]

An episode: a run of the start record, the same in all; two runs of the candidate, with seeds of their own; and a
submission. Candidates are one program at claims whose margins follow the mix of benchmarks/false_accepts.py, 70 %
bad, 20 % near and 10 % good, in units of sigma. The ways add up: the naive one starts a process for each run, whenever
an environment asks for it, and reruns each submission ten times; then runs wait for a core of their own (slots), start
from a warm process, identical ones are trained once, and submissions are rerun until the sequential test knows. The
clock starts when all environments stand, as these last. With the sequential test episodes differ in length, so it plays
the mix six times. Writes benchmarks/results/episodes.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
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
WAYS = {"naive": 1, "slots": 1, "warm": 1, "shared": 1, "sequential": 6}
"""how often each plays the mix"""


def has(way: str, factor: str) -> bool:
    """The ways add up."""
    return list(WAYS).index(way) >= list(WAYS).index(factor)


def backend_of(way: str) -> Backend:
    local = LocalBackend("auto", warm=has(way, "warm"))
    if way == "naive":
        return local
    queued = Queued(local, owner=secrets.token_hex(4))
    return Shared(queued, local.kind) if has(way, "shared") else queued


def episode(env: Speedrun, way: str, margin: float, number: int) -> tuple[bool, int]:
    """Play it; whether the submission was accepted, if the way decides that, and after how many reruns."""
    tier = env.tier
    assert isinstance(tier, StepsTier)
    env.reset()
    do(env, Run(horizon=tier.record(START).horizon, seed=7))
    record = tier.record(RECORD)
    claim = round(tier.measured.records[RECORD].steps_mean + margin * tier.measured.sigma / SLOPE)
    do(env, WriteFile(path="optimizer.py", text=record.sources["optimizer.py"]))
    for i in (1, 2):
        do(env, Run(horizon=record.horizon, seed=1000 * number + i))
    if has(way, "sequential"):
        verdict = do(env, Submit(claim=claim, horizon=record.horizon))["verdict"]
        assert not verdict["cached"]
        return verdict["accepted"], verdict["n"]
    plan = tier.plan(record.horizon, claim)
    for _ in range(FIXED):
        job = tier.job(record.sources, plan, secrets.token_hex(32), (tier.table.data.hidden,))
        if not env.episode.backend.start(job).result().completed:
            raise SystemExit("a rerun did not complete")
    return False, FIXED


def do(env: Speedrun, action: Action) -> dict[str, Any]:
    observation, *_, info = env.step(action)
    if info.get("error") or info.get("run", {}).get("exit_reason", "completed") != "completed":
        raise SystemExit(observation["text"])
    return info


def work(way: str, tasks: Any, answers: Any, folder: str) -> None:
    with closing(Speedrun("nano-steps", backend=backend_of(way), state_dir=folder)) as env:
        env.reset()
        do(env, Run(horizon=5))  # what stands from now on is there
        answers.put(None)
        while (task := tasks.get()) is not None:
            margin, number = task
            answers.put(episode(env, way, margin, number))


def answer(answers: Any, workers: list[Any]) -> Any:
    while True:
        try:
            return answers.get(timeout=5)
        except queue.Empty:
            if any(worker.exitcode for worker in workers):
                raise SystemExit("an environment failed") from None


def play(way: str, environments: int) -> dict[str, Any]:
    """All episodes of the mix, so many at a time."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NANOGPT_ENV_CACHE"] = f"{folder}/cache"
        context = multiprocessing.get_context("spawn")
        tasks, answers = context.Queue(), context.Queue()
        shared = (way, tasks, answers, folder)
        workers = [context.Process(target=work, args=shared, daemon=True) for _ in range(environments)]
        for worker in workers:
            worker.start()
        for _ in workers:
            answer(answers, workers)  # it stands
        margins = MARGINS * WAYS[way]
        began = time.monotonic()
        # nobody knows beforehand which take long
        for number in np.random.default_rng(0).permutation(len(margins)):
            tasks.put((margins[number], int(number)))
        for _ in workers:
            tasks.put(None)
        played = [answer(answers, workers) for _ in margins]
        took = time.monotonic() - began
        for worker in workers:
            worker.join()
    n, reruns = len(played), [reruns for _, reruns in played]
    spread = {"reruns": float(np.mean(reruns)), "standard_error": float(np.std(reruns, ddof=1) / n**0.5)}
    return {"way": way, "episodes": n, "seconds": took, "accepted": sum(ok for ok, _ in played), **spread}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--environments", type=int, default=4)
    args = parser.parse_args()
    cores, rows = len(os.sched_getaffinity(0)), list[dict[str, Any]]()
    for way in WAYS:
        row = play(way, args.environments)
        rows.append(row)
        row["episodes_per_core_hour"] = rate = 3600 * row["episodes"] / row["seconds"] / cores
        row["times_naive"] = rate / rows[0]["episodes_per_core_hour"]
        row["times_before"] = rate / rows[max(len(rows) - 2, 0)]["episodes_per_core_hour"]
        print(row, flush=True)
    command = f"python benchmarks/episodes.py --environments {args.environments}"
    known = {"command": command, "cores": cores, "rows": rows}
    (RESULTS / "episodes.json").write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()

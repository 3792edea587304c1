"""What an episode spends beside training and the final evaluation, and what a step costs that does not train.

    python benchmarks/overhead.py [--runs 5] [--steps 300]

Per tier, runs of the start record by `env.step(Run())` on warm starts, after one that is not counted: the share of the
step's seconds that is neither training (the trainer's clock) nor final evaluation (from when the trainer says that it
evaluates). Then notes, edits and reads, in milliseconds. Writes benchmarks/results/overhead.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from nanogpt_env import Note, ReadFile, Run, Speedrun, WriteFile

RESULTS = Path(__file__).parent / "results" / "overhead.json"
TIERS = ("nano-steps", "nano-wallclock", "micro-steps", "micro-wallclock")


class Watch:
    """When the run that is going on began its final evaluation."""

    def __init__(self) -> None:
        self.handle: Any = None
        self.evaluating_at = 0.0
        self._over = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def see(self, _: str, handle: Any) -> None:
        self.handle = handle

    def _look(self) -> None:
        while not self._over.wait(0.005):
            found = self.handle.progress() if self.handle else None
            if found and found.evaluating and not self.evaluating_at:
                self.evaluating_at = time.monotonic()

    def close(self) -> None:
        self._over.set()


def run(env: Speedrun, seed: int) -> dict[str, float]:
    with closing(Watch()) as watch:
        env.on_progress = watch.see
        began = time.monotonic()
        *_, info = env.step(Run(seed=seed))  # identical runs would be trained once
        ended = time.monotonic()
    result = info["run"]
    if result["exit_reason"] != "completed" or not watch.evaluating_at:
        raise SystemExit(str(info))
    parts = {"training": result["train_seconds"], "evaluation": ended - watch.evaluating_at}
    return {"seconds": ended - began, **parts, "share": 1 - sum(parts.values()) / (ended - began)}


def idle_steps(env: Speedrun, count: int) -> dict[str, dict[str, float]]:
    """Milliseconds of steps that train nothing."""
    name, text = next(iter(env.workspace.files.items()))
    kinds = {"note": Note(text="x"), "write": WriteFile(path=name, text=text), "read": ReadFile(path=name)}
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(count // len(kinds)):
        for kind, action in kinds.items():
            began = time.perf_counter()
            *_, info = env.step(action)
            found[kind].append(1000 * (time.perf_counter() - began))
            if info.get("error"):
                raise SystemExit(str(info))
    return {kind: {"median": statistics.median(ms), "p99": statistics.quantiles(ms, n=100)[98], "n": len(ms)}
            for kind, ms in found.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    found: dict[str, Any] = {"command": f"python benchmarks/overhead.py --runs {args.runs} --steps {args.steps}"}
    for tier in TIERS:
        with tempfile.TemporaryDirectory() as folder, closing(Speedrun(tier, state_dir=folder)) as env:
            env.reset()
            run(env, 0)
            rows = [run(env, seed) for seed in range(1, args.runs + 1)]
            shares = [row["share"] for row in rows]
            found[tier] = {"share": {"median": statistics.median(shares), "min": min(shares), "max": max(shares)},
                           "runs": rows}  # fmt: skip
            print(f"{tier}: {found[tier]['share']}", flush=True)
            if tier == TIERS[0]:
                found["idle_ms"] = idle_steps(env, args.steps)
                print(found["idle_ms"], flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What a run costs before its first step and around its steps: cold, with one warm spare, and forked.

    python benchmarks/warm_starts.py [--repeats 12] [--reruns 8]

A spare is a cold start made ahead and given its job when it has loaded everything; forked is what
`LocalBackend(warm=True)` does. In turn, so that other load on the machine meets all alike:

- `repeats` runs of few steps on a tiny model: seconds from `start` to the first step and to the result, and CPU seconds
  (user and system) of all processes of the run. Few of them are training, the same in all three.
- `reruns` runs of a tier's anchor with its full steps, as in a verification: seconds and CPU seconds of all together.

Writes benchmarks/results/warm-starts.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from nanogpt_env.backends.local import LocalBackend, LocalRun
from nanogpt_env.backends.trainers import launch
from nanogpt_env.tiers import load_tier
from nanogpt_env.tracks import StepsTier
from nanogpt_env.types import Job, Plan, RunResult

TINY = Path(__file__).parents[1] / "tests" / "tiny-steps"
PR_SET_CHILD_SUBREAPER = 36
CLOCK = """
import time
def schedule(step, horizon, optimizers):
    if step == 0: print("first step", time.clock_gettime(time.CLOCK_MONOTONIC))
"""
SGD = "import torch\ndef configure(params, horizon):\n    return torch.optim.SGD(params.values(), lr=0.1)\n"
Figures = dict[str, float]


def cpu_seconds(pid: int, *, children: bool = True) -> float:
    """Of a process and of those of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(x) for x in fields[11 : 15 if children else 13]) / os.sysconf("SC_CLK_TCK")


def below(pid: int) -> list[int]:
    found = [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*found, *(x for child in found for x in below(child))]


class Cold:
    def __init__(self) -> None:
        self.backend = LocalBackend("bubblewrap")

    def settle(self) -> None:
        """Wait until nothing of ours is loading."""

    def start(self, job: Job) -> LocalRun:
        return self.backend.start(job)

    def cpu(self) -> float:
        """So far, of processes that have ended. A candidate outlives its launcher by a moment and becomes our child."""
        for pid in below(os.getpid()):
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
            if state == "Z" and int(parent) == os.getpid():
                os.waitpid(pid, 0)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def close(self) -> None:
        self.backend.close()


class Spare(Cold):
    def __init__(self) -> None:
        super().__init__()
        self.next = launch("steps", "bubblewrap", (), "")

    def settle(self) -> None:
        seen = -1.0
        while seen != (seen := sum(cpu_seconds(p) for p in [self.next.pid, *below(self.next.pid)])):
            time.sleep(1.0)

    def start(self, job: Job) -> LocalRun:
        run = LocalRun(self.next, job)
        self.next = launch("steps", "bubblewrap", (), "")
        return run

    def close(self) -> None:
        self.next.kill()
        self.next.wait()
        super().close()


class Forked(Cold):
    def __init__(self) -> None:
        self.backend = LocalBackend("bubblewrap", warm=True)
        self.backend.prepare()

    def cpu(self) -> float:
        server = self.backend._server
        assert server and not self.backend.cold_because
        server.wait()
        standing = [server._process.pid, *below(server._process.pid)]
        return sum(cpu_seconds(pid) for pid in standing)


def measure(way: Cold, job: Job) -> tuple[Figures, RunResult]:
    before, began = way.cpu(), time.monotonic()
    result = way.start(job).result(600)
    took = time.monotonic() - began
    time.sleep(0.2)  # until all of it has been waited for
    assert result.completed, result.detail
    figures = {"wall_s": took, "cpu_s": way.cpu() - before}
    if "first step" in result.log:
        figures["first_step_s"] = float(result.log.split()[-1]) - began
    return figures, result


def in_turn(ways: dict[str, Cold], job: Callable[[int], Job], count: int) -> dict[str, list[Figures]]:
    rows: dict[str, list[Figures]] = {name: [] for name in ways}
    for i in range(count):
        losses = set()
        for name, way in ways.items():
            for other in ways.values():
                other.settle()
            figures, result = measure(way, job(i))
            rows[name].append(figures)
            losses.add(result.train_losses)
            print(i, name, "  ".join(f"{k} {v:.2f}" for k, v in figures.items()), flush=True)
        assert len(losses) == 1, "the losses should be the same to the bit"
    return rows


def summary(rows: list[Figures]) -> dict[str, Figures]:
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return {
        key: {"median": statistics.median(c), "min": min(c), "max": max(c), "sum": sum(c), "n": len(c)}
        for key, c in columns.items()
    }


def anchor_job(tier: StepsTier, i: int) -> Job:
    record = tier.record(tier.table.valued[-1])
    plan = Plan(steps=int(tier.value_of(record.name)), horizon=record.horizon)
    return tier.job(record.sources, plan, f"warm-{i}", (tier.table.data.public,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--reruns", type=int, default=8)
    args = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    tiny, tier = load_tier(TINY), load_tier("nano-steps")
    assert isinstance(tier, StepsTier)
    program, plan = {"optimizer.py": SGD + CLOCK}, Plan(steps=3, horizon=3)
    ways = {"cold": Cold(), "spare": Spare(), "forked": Forked()}
    try:
        measure(ways["cold"], anchor_job(tier, 0))  # unpacks the corpora
        short = in_turn(ways, lambda i: tiny.job(program, plan, f"warm-{i}", ("val_public",)), args.repeats)
        verification = in_turn(ways, lambda i: anchor_job(tier, i), args.reruns)
    finally:
        for way in ways.values():
            way.close()
    result = {
        "command": f"python benchmarks/warm_starts.py --repeats {args.repeats} --reruns {args.reruns}",
        "short_run": {name: summary(rows) for name, rows in short.items()},
        "verification": {name: summary(rows) for name, rows in verification.items()},
        "hardware": f"{os.cpu_count()} shared cores, {platform.machine()}",
        "rows": {"short_run": short, "verification": verification},
    }
    path = Path(__file__).parent / "results" / "warm-starts.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for part in ("short_run", "verification"):
        print(part, json.dumps(result[part], indent=1))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

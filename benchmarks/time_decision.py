"""The decision on time, on real runs: a program against itself, and against one that is truly 10 % faster.

    python benchmarks/time_decision.py [--sessions 40] [--faster 15] [--load 0] [--steps 40]

Sessions are those of verification: an uncounted run, then pairs in turn on one core, in the sandbox, each session on a
backend of its own. The program is a record of a wallclock tier, cut to `--steps` so that many sessions can be had;
short runs are noisier than whole ones. "Itself" differs by an allocation of random size, kept for the whole run:
what the place of things in memory does to a program is part of the noise.
`--load N` keeps N other processes computing meanwhile. From each session decisions are resampled: pairs drawn with
replacement within one session, and, for the program against itself, each with a random sign. Writes
benchmarks/results/time_decision-load-N.json after every session, and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import platform
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.backends.queued import Queued
from nanogpt_env.stats import upper_sd
from nanogpt_env.tiers import load_tier
from nanogpt_env.timing import PairTest, order
from nanogpt_env.tracks import WallclockTier

RESULTS = Path(__file__).parent / "results"
LEVELS = (0.00125, 0.01, 0.05)
RESAMPLED = 4000
FASTER = 0.9  # share of the steps
STEPS = re.compile(r"^STEPS = \d+", re.MULTILINE)

Session = dict[str, list[float]]


def session(tier: WallclockTier, backend: Queued, candidate: str, reference: str, pairs: int) -> Session:
    """Training seconds of both, in the order of verification."""

    def run(source: str) -> float:
        shards = (tier.table.data.public,)
        result = backend.start(tier.job({"train.py": source}, None, secrets.token_hex(16), shards)).result()
        if not result.completed:
            raise SystemExit(f"{result.exit_reason}: {result.detail}\n{result.log}")
        return result.train_seconds

    found: Session = {"candidate": [], "reference": []}
    with backend.exclusive():
        run(reference)
        for turn in (turn for pair in order(pairs) for turn in pair):
            found["candidate" if turn else "reference"].append(run(candidate if turn else reference))
    return found


def moved(source: str) -> str:
    """The same program with other things at other places."""
    return source.replace("model = GPT", f"kept = torch.empty({secrets.randbelow(1 << 20)})\nmodel = GPT", 1)


@contextlib.contextmanager
def load(count: int) -> Iterator[None]:
    """`count` processes that compute all the time."""
    workers = [multiprocessing.Process(target=_burn, daemon=True) for _ in range(count)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()


def _burn() -> None:
    x = np.ones((200, 200))
    while True:
        x = np.tanh(x @ x / 200)


def log_ratios(sessions: list[Session]) -> Any:
    return np.array([np.log(s["candidate"]) - np.log(s["reference"]) for s in sessions])


def summary(rows: dict[str, list[Session]], pairs: int, drift: float) -> dict[str, Any]:
    same = log_ratios(rows["same"])
    floor = upper_sd([(float(r.std(ddof=1)), len(r)) for r in same])[1]
    tests = {level: PairTest(pairs=pairs, level=level, floor=floor, drift=drift) for level in LEVELS}
    void = [tests[LEVELS[0]].decide(s["candidate"], s["reference"]).void for s in rows["same"]]
    out: dict[str, Any] = {
        "pair_sd": float(np.sqrt((same.var(axis=1, ddof=1)).mean())),
        "pair_sd_upper": floor,
        "session_sd_of_mean": float(same.mean(axis=1).std(ddof=1)),
        "expected_sd_of_mean": float(np.sqrt((same.var(axis=1, ddof=1)).mean() / pairs)),
        "void_sessions": sum(void),
        "sessions": len(same),
    }
    rng = np.random.default_rng(0)
    drawn = same[rng.integers(len(same), size=RESAMPLED)[:, None], rng.integers(pairs, size=(RESAMPLED, pairs))]
    drawn = drawn * rng.choice([-1.0, 1.0], size=(RESAMPLED, 1))
    out["same_resampled"] = {
        str(level): {"decisions": RESAMPLED, "faster": int((test.bounds(drawn) < 0).sum())}
        for level, test in tests.items()
    }
    out["same_as_run"] = {
        str(level): {"decisions": 2 * len(same), "faster": sum(int((test.bounds(s * same) < 0).sum()) for s in (1, -1))}
        for level, test in tests.items()
    }
    if rows["faster"]:
        ratios = log_ratios(rows["faster"])
        out["truly_faster"] = {
            "steps_ratio": FASTER,
            "sessions": len(ratios),
            "time_ratio": float(np.exp(ratios.mean())),
            "time_ratio_error": float(ratios.std(ddof=1) / math.sqrt(ratios.size)),
            "shown": {str(level): int((test.bounds(ratios) < 0).sum()) for level, test in tests.items()},
            "paid_ratio": {
                str(level): float(np.exp(np.minimum(test.bounds(ratios), 0.0)).mean()) for level, test in tests.items()
            },
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tier", default="nano-wallclock")
    parser.add_argument("--record", default="normuon")
    parser.add_argument("--sessions", type=int, default=40)
    parser.add_argument("--faster", type=int, default=15)
    parser.add_argument("--load", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    tier = load_tier(args.tier, calibrated=False)
    assert isinstance(tier, WallclockTier)
    hidden = (tier.folder, tier.corpus_folder())
    source, v = tier.record(args.record).sources["train.py"], tier.table.verification
    same, faster = (STEPS.sub(f"STEPS = {n}", source) for n in (args.steps, round(FASTER * args.steps)))
    path = RESULTS / f"time_decision-load-{args.load}.json"
    rows: dict[str, list[Session]] = {"same": [], "faster": []}
    if path.exists():
        kept = json.loads(path.read_text())
        rows = kept["sessions"] if kept["arguments"]["steps"] == args.steps else rows
    with load(args.load):
        while len(rows["same"]) < args.sessions or len(rows["faster"]) < args.faster:
            # in turn, so that both meet the same hours of the machine
            behind = len(rows["same"]) * args.faster <= len(rows["faster"]) * args.sessions
            kind = "same" if behind and len(rows["same"]) < args.sessions else "faster"
            candidate = moved(same if kind == "same" else faster)
            with contextlib.closing(Queued(LocalBackend("auto", warm=True, hidden=hidden), "benchmark")) as backend:
                rows[kind].append(session(tier, backend, candidate, same, v.pairs))
            print(f"{kind} {len(rows[kind])}: {np.exp(log_ratios(rows[kind][-1:])).round(3).tolist()[0]}", flush=True)
            content = {
                "command": "python benchmarks/time_decision.py "
                + " ".join(f"--{k} {x}" for k, x in vars(args).items()),
                "arguments": vars(args),
                "cores": multiprocessing.cpu_count(),
                "machine": platform.machine(),
                "summary": summary(rows, v.pairs, v.drift) if len(rows["same"]) > 1 else {},
                "sessions": rows,
            }
            path.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(summary(rows, v.pairs, v.drift), indent=1))


if __name__ == "__main__":
    main()

"""Does a run's time depend on where things happen to lie in memory? Programs that differ by one allocation only.

    python benchmarks/memory_layout.py [--programs 8] [--rounds 8] [--steps 40]

All are the same record, cut to `--steps`, with an allocation of random size more, kept for the whole run. Forked from
one process they share its address layout, so what favours one of them does so in every run. The rounds are shuffled;
F compares the spread of the programs' means with that within programs (1: nothing). Two ways to free memory in turn:
kept by the process, as candidates have it, and given back to the system at once (128 KiB, the C library's first
setting). Writes benchmarks/results/memory_layout.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import random
import re
import secrets
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.backends.queued import Queued
from nanogpt_env.tiers import load_tier
from nanogpt_env.tracks import WallclockTier

RESULTS = Path(__file__).parent / "results"
STEPS = re.compile(r"^STEPS = \d+", re.MULTILINE)
GIVE_BACK = "import ctypes\nctypes.CDLL(None).mallopt(-1, 128 << 10)\n"  # M_TRIM_THRESHOLD
COUNT = "import resource\nfaults = -resource.getrusage(0).ru_minflt\n"
TELL = "faults += resource.getrusage(0).ru_minflt\nprint('faults', faults)\n"


def program(source: str, kept: int, give_back: bool) -> str:
    source = source.replace("model = GPT", f"kept = torch.empty({kept})\nmodel = GPT", 1)
    source = source.replace("speedrun.start()\n", COUNT + "speedrun.start()\n", 1)
    return (GIVE_BACK if give_back else "") + source.replace("speedrun.save(", TELL + "speedrun.save(", 1)


def summary(seconds: Any, faults: Any) -> dict[str, Any]:
    """One-way analysis of variance of log seconds, shape (programs, rounds); what a round shares is taken out."""
    x = np.log(seconds)
    x = x - x.mean(axis=0)
    programs, rounds = x.shape
    within, between = x.var(axis=1, ddof=1).mean(), x.mean(axis=1).var(ddof=1)
    f = float(between / (within / rounds))
    degrees = programs - 1, programs * (rounds - 1)
    return {
        "seconds": float(np.exp(np.log(seconds).mean())),
        "sd_of_a_run": float(np.sqrt(within)),
        "sd_of_program_means": float(np.sqrt(between)),
        "F": f,
        "p": float(importlib.import_module("scipy.special").fdtrc(*degrees, f)),
        "page_faults": [int(faults.min()), int(np.median(faults)), int(faults.max())],
        "runs": seconds.round(4).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tier", default="nano-wallclock")
    parser.add_argument("--record", default="normuon")
    parser.add_argument("--programs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    tier = load_tier(args.tier, calibrated=False)
    assert isinstance(tier, WallclockTier)
    source = STEPS.sub(f"STEPS = {args.steps}", tier.record(args.record).sources["train.py"])
    sizes = [secrets.randbelow(1 << 20) for _ in range(args.programs)]
    turns = [(i, back) for i in range(args.programs) for back in (False, True)]
    seconds, faults = np.zeros((2, args.programs, args.rounds)), np.zeros((2, args.programs, args.rounds))
    hidden = (tier.folder, tier.corpus_folder())
    with (
        contextlib.closing(Queued(LocalBackend("auto", warm=True, hidden=hidden), "benchmark")) as backend,
        backend.exclusive(),
    ):
        for done in range(-1, args.rounds):  # the first round does not count
            for i, back in random.sample(turns, len(turns)):
                job = {"train.py": program(source, sizes[i], back)}
                result = backend.start(tier.job(job, None, secrets.token_hex(16), (tier.table.data.public,))).result()
                if not result.completed:
                    raise SystemExit(f"{result.exit_reason}: {result.detail}\n{result.log}")
                seconds[int(back), i, done] = result.train_seconds
                faults[int(back), i, done] = int(re.findall(r"faults (\d+)", result.log)[0])
            print(f"round {done + 1} of {args.rounds}", flush=True)
    found = {"kept": summary(seconds[0], faults[0]), "given_back": summary(seconds[1], faults[1])}
    content = {
        "command": "python benchmarks/memory_layout.py " + " ".join(f"--{k} {v}" for k, v in vars(args).items()),
        "hardware": result.hardware,
        **found,
    }
    (RESULTS / "memory_layout.json").write_text(json.dumps(content, indent=1) + "\n")
    for name, row in found.items():
        print(name, {k: v for k, v in row.items() if k != "runs"})


if __name__ == "__main__":
    main()

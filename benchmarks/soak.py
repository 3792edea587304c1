"""Do thousands of short runs leave anything behind? Descriptors, memory, shared memory, processes, control groups.

    python benchmarks/soak.py [--runs 1000] [--sandbox bubblewrap]

Runs of one step, one after the other, on one warm backend; every tenth ends by a fault of the candidate or is
cancelled. Counted every 50 runs, of this process and all that it has started: flat is good. Writes
benchmarks/results/soak-SANDBOX.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import closing
from pathlib import Path

from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.tiers import load_tier
from nanogpt_env.types import Plan

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu_backend"))

import cgroups

RESULTS = Path(__file__).parent / "results"
EVERY = 50
RULE = "import torch\ndef configure(params, horizon):\n    return torch.optim.SGD(params.values(), lr=0.1)\n"
ENDS = {0: RULE + "raise ValueError\n", 5: RULE + "import os\nos._exit(3)\n"}  # by the run's last digit


def family() -> list[int]:
    """This process and all that it has started."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:
            continue  # ended meanwhile
    found, level = [os.getpid()], [os.getpid()]
    while level:
        level = [pid for pid, parent in parents.items() if parent in level]
        found += level
    return found


def counts() -> dict[str, float]:
    pids = family()
    resident = 0
    descriptors = 0
    for pid in pids:
        try:
            resident += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
        except OSError:
            continue
    groups = [group for parent in cgroups.find()[0] for group in parent.glob(f"{cgroups.PREFIX}-*")]
    return {
        "descriptors": descriptors,
        "own_descriptors": len(os.listdir("/proc/self/fd")),
        "resident_mib": round(resident / (1 << 20), 1),
        "processes": len(pids),
        "shared_memory_files": len(os.listdir("/dev/shm")),
        "control_groups": len(groups),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--sandbox", default="bubblewrap")
    args = parser.parse_args()
    tier = load_tier("nano-steps")
    rows, ends = [], dict[str, int]()
    began = time.monotonic()
    with closing(LocalBackend(args.sandbox, warm=True)) as backend:
        for number in range(1, args.runs + 1):
            source = ENDS.get(number % 10, RULE)
            run = backend.start(
                tier.job({"optimizer.py": source}, Plan(steps=1, horizon=1), str(number), ("val_public",))
            )
            if number % 10 == 7:
                run.cancel()
            reason = run.result(120).exit_reason
            ends[reason] = ends.get(reason, 0) + 1
            if number % EVERY == 0:
                rows.append({"runs": number, "seconds": round(time.monotonic() - began, 1), **counts()})
                print(rows[-1], flush=True)
    after = counts()
    command = f"python benchmarks/soak.py --runs {args.runs} --sandbox {args.sandbox}"
    content = {"command": command, "ends": ends, "rows": rows, "after_close": after}
    (RESULTS / f"soak-{args.sandbox}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(ends, after)


if __name__ == "__main__":
    main()

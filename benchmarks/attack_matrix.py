"""Every attack and every honest control on every sandbox of this host, and by the naive scorer.

    python benchmarks/attack_matrix.py [--sandboxes bubblewrap,landlock,docker]

Writes benchmarks/results/attacks.json after each case, goes on where it stopped (a case is run again when it, or the
trainer, has changed), and at the end docs/attacks.md. `make test-all` runs it, on every sandbox of this host.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import platform
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from nanogpt_env import attacks, content, display
from nanogpt_env.backends.local import LocalBackend, sandbox_report
from nanogpt_env.trap import Trap, validation_files

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "attacks.json", ROOT / "docs" / "attacks.md"
ORDER = ("bubblewrap", "landlock", "docker")
COMMAND = "python benchmarks/attack_matrix.py"


def run(sandbox: str, found: dict[str, Any], first: bool) -> None:
    """`first`: with the naive scorer, and with whole submissions, whose verdict is no matter of the sandbox."""
    rows = found["outcomes"].setdefault(sandbox, {})
    every = [case for case in attacks.load_cases() if first or case.track != "submissions"]
    digests = {case.name: _digest(case) for case in every}
    for name in [name for name, row in rows.items() if row["digest"] != digests.get(name)]:
        del rows[name]
    cases = [case for case in every if case.name not in rows]
    corpus = content.content_root() / "gpu_backend" / "corpora"
    with (
        tempfile.TemporaryDirectory() as folder,
        Trap(validation_files(corpus)) as trap,
        contextlib.closing(LocalBackend(sandbox, warm=True)) as backend,
        display.steps(sandbox, len(cases)) as step,
    ):
        suite = attacks.Suite(backend, trap, Path(folder), first)
        for case in cases:
            step(case.name)
            row = suite.run(case).model_dump()
            rows[case.name] = row | {"naive": without_paths(row["naive"]), "digest": digests[case.name]}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def without_paths(text: str) -> str:
    """Where things lie on this host is nobody's business."""
    return re.sub(r"(/[\w.-]+)+(/[\w.-]+)", r"...\2", text.partition(": in ")[0])


def _digest(case: attacks.Case) -> str:
    return hashlib.sha256(case.model_dump_json().encode() + content.trainer_code()).hexdigest()[:16]


def page(found: dict[str, Any]) -> str:
    """docs/attacks.md, from the results."""
    sandboxes = list(found["outcomes"])
    first = found["outcomes"][sandboxes[0]]
    counts = {
        name: collections.Counter(o["verdict"] for o in rows.values()) for name, rows in found["outcomes"].items()
    }
    lines = [
        "# Attacks",
        "",
        f"Made by `{COMMAND}`: each case once on each sandbox ({found['machine']}, torch {found['torch']}).",
        "*Caught*: the run ended without a result, for that reason. *No effect*: it ended with what an honest one",
        "measures, and nothing on the host was reached. Beside it what the same candidate gets from a scorer as one",
        "writes it at first (`tests/attacks/naive`). Whether our static judge refuses the source plays no part.",
        "A case in `submissions` is a claim that is not deserved, verified three times; the naive scorer is then one",
        "of the protocols in use: ten runs of which those that failed are dropped, one run's loss, one pair's times.",
        f"They were verified in {sandboxes[0]} only.",
        "",
        *(f"- {name}: " + ", ".join(f"{n} {verdict}" for verdict, n in c.items()) for name, c in counts.items()),
        "",
        f"| case | threats | {' | '.join(sandboxes)} | naive scorer |",
        f"| --- | --- | {' | '.join('---' for _ in sandboxes)} | --- |",
    ]
    for name, outcome in first.items():
        cells = [_cell(found["outcomes"][s].get(name)) for s in sandboxes]
        lines.append(f"| {name} | {', '.join(outcome['threats'])} | {' | '.join(cells)} | {outcome['naive']} |")
    lines += ["", "## Bounded", "", "Not stopped, but worth no more than this.", ""]
    lines += ["| what | threats | gain | measured by |", "| --- | --- | --- | --- |"]
    for each in attacks.load_bounded():
        evidence = f"`{each.command}` ([results](../benchmarks/results/{each.results}))"
        lines.append(f"| {each.idea} | {', '.join(each.threats)} | {each.gain} | {evidence} |")
    return "\n".join(lines) + "\n"


def _cell(outcome: dict[str, Any] | None) -> str:
    if outcome is None:
        return ""
    reason = outcome["detail"].split(";")[0]
    return f"caught: {reason}" if outcome["verdict"] == "caught" and " " not in reason else str(outcome["verdict"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sandboxes", default="")
    args = parser.parse_args()
    offered = [name for name, box in sandbox_report()["sandboxes"].items() if box["available"] and box["trusted"]]
    chosen = args.sandboxes.split(",") if args.sandboxes else sorted(offered, key=ORDER.index)
    found: dict[str, Any] = {"outcomes": {}}
    if RESULTS.exists():
        found = json.loads(RESULTS.read_text())
    machine = f"{platform.system()} {platform.release().partition('-')[0]}"
    found |= {"command": COMMAND, "machine": machine, "torch": torch.__version__}
    for number, sandbox in enumerate(chosen):
        run(sandbox, found, first=number == 0)
    PAGE.write_text(page(found))
    bad = [f"{s}: {n}" for s, rows in found["outcomes"].items() for n, o in rows.items() if o["verdict"] in attacks.BAD]
    print("\n".join(bad) or "none got through, no control was refused")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

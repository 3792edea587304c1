"""What this machine offers to run candidates in, and why not more; as JSON: `python report.py [--auto]`."""

from __future__ import annotations

import json
import sys

import cgroups
import sandbox
import warm


def report() -> dict[str, object]:
    reasons = {name: kind.unavailable() for name, kind in sandbox.KINDS.items()}
    cold = warm.unavailable()
    groups = cgroups.find()
    return {
        "sandboxes": {
            name: {"available": not reason, "reason": reason, "trusted": sandbox.KINDS[name].trusted}
            for name, reason in reasons.items()
        },
        "auto": next(name for name, reason in reasons.items() if not reason),
        "warm_starts": {"available": not cold, "reason": cold},
        "how_to_trust": sandbox.HOW_TO_TRUST,
        "cgroups": {"available": bool(groups[0]), "version": groups[1], "reason": groups[2]},
    }


if __name__ == "__main__":
    # which sandbox `auto` stands for can be told without trying them all
    print(json.dumps({"auto": sandbox.best()} if "--auto" in sys.argv else report(), indent=2))

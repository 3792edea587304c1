"""What this machine offers to run candidates in, and why not more; as JSON: `python report.py`."""

from __future__ import annotations

import json

import sandbox
import warm


def report() -> dict[str, object]:
    binary, reason = sandbox.find_bubblewrap()
    cold = warm.unavailable()
    return {
        "bubblewrap": {"available": bool(binary), "path": binary, "reason": reason, "trusted": True},
        "plain": {"available": True, "trusted": False, "reason": sandbox.HOW_TO_TRUST},
        "auto": "bubblewrap" if binary else "plain",
        "warm_starts": {"available": not cold, "reason": cold},
    }


if __name__ == "__main__":
    print(json.dumps(report(), indent=2))

"""What a verified number of steps is worth. Pure functions; `replay.py` applies them to a ledger."""

from __future__ import annotations

import math
from typing import Literal

RewardForm = Literal["linear", "log"]


def recovered(start: float, anchor: float, value: float) -> float:
    """Share of the human speedup that is recovered: (start - value) / (start - anchor).

    0 at the start record, 1 at the anchor, above 1 ahead of the humans; all in steps, or all in seconds
    measured side by side. The form of NanoGPT-Bench. Raises ValueError unless start > anchor > 0.
    """
    _check(start, anchor)
    return (start - value) / (start - anchor)


def recovered_log(start: float, anchor: float, value: float) -> float:
    """The same on a log scale: ln(start / value) / ln(start / anchor). Raises ValueError also if value <= 0."""
    _check(start, anchor)
    if value <= 0:
        raise ValueError(f"value must be positive, got {value}")
    return math.log(start / value) / math.log(start / anchor)


def share(form: RewardForm, start: float, anchor: float, value: float) -> float:
    """`recovered` in the form a tier rewards. Raises ValueError for an unknown form."""
    if form not in ("linear", "log"):
        raise ValueError(f"a reward form is linear or log, not {form!r}")
    return (recovered if form == "linear" else recovered_log)(start, anchor, value)


def _check(start: float, anchor: float) -> None:
    if not start > anchor > 0:
        raise ValueError(f"need start > anchor > 0, got start {start} and anchor {anchor}")

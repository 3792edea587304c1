"""nanogpt_env: the NanoGPT speedrun as a Gymnasium environment with verified rewards.

    env = gymnasium.make("nanogpt_env:NanoGPT/Speedrun-v0", tier="nano-steps")

Importing this package registers that id and one per built-in tier, such as "NanoGPT/NanoSteps-v0".
"""

from __future__ import annotations

import gymnasium

from nanogpt_env.actions import (
    Action,
    ApplyPatch,
    Cancel,
    EditFile,
    Note,
    Poll,
    ReadFile,
    Revert,
    Run,
    Stop,
    Submit,
    WriteFile,
    parse_action,
)
from nanogpt_env.env import Speedrun
from nanogpt_env.errors import (
    ActionError,
    BackendError,
    BudgetError,
    LedgerError,
    NanoGPTError,
    TierError,
)
from nanogpt_env.tiers import load_tier
from nanogpt_env.types import RunResult, Verdict

__version__ = "0.1.0"

__all__ = [
    "Action",
    "ActionError",
    "ApplyPatch",
    "BackendError",
    "BudgetError",
    "Cancel",
    "EditFile",
    "LedgerError",
    "NanoGPTError",
    "Note",
    "Poll",
    "ReadFile",
    "Revert",
    "Run",
    "RunResult",
    "Speedrun",
    "Stop",
    "Submit",
    "TierError",
    "Verdict",
    "WriteFile",
    "load_tier",
    "parse_action",
]


def _register() -> None:
    from nanogpt_env.tiers import builtin_tiers

    entry_point = "nanogpt_env.env:Speedrun"
    # Verification seeds are secret, so no id is deterministic.
    gymnasium.register("NanoGPT/Speedrun-v0", entry_point=entry_point, nondeterministic=True)
    for name in builtin_tiers():
        title = "".join(part.capitalize() for part in name.split("-"))
        gymnasium.register(f"NanoGPT/{title}-v0", entry_point=entry_point, nondeterministic=True, kwargs={"tier": name})


_register()

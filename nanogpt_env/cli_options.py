"""Options that commands share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from nanogpt_env import display
from nanogpt_env.backends.local import SANDBOXES
from nanogpt_env.env import Speedrun

TierOption = Annotated[str, typer.Option("--tier", help="Name of a tier (see `tiers list`) or path of its folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def _known_sandbox(value: str) -> str:
    if value not in SANDBOXES:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(SANDBOXES)}")
    return value


SandboxOption = Annotated[
    str,
    typer.Option(
        callback=_known_sandbox,
        help="docker, bubblewrap, landlock, plain (not isolated: results are `trusted: false`), or auto: the first of "
        "these that works here.",
    ),
]
DirArgument = Annotated[
    Path,
    typer.Argument(help="Folder with the candidate: optimizer.py or train.py, as the tier says.", show_default=False),
]
BudgetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        help="METER=VALUE instead of the tier's, such as device_seconds=300; may be repeated.",
        metavar="METER=VALUE",
    ),
]


def budget_of(options: list[str] | None) -> dict[str, float]:
    """Raises `BadParameter` for what is not METER=VALUE; which meters there are says the environment."""
    found = {}
    for option in options or ():
        try:
            meter, value = option.split("=")
            found[meter.strip()] = float(value)
        except ValueError:
            raise typer.BadParameter(f"a budget is METER=VALUE, such as runs=20, not {option!r}") from None
    return found


@contextmanager
def environment(
    tier: str,
    sandbox: str,
    state_dir: Path | None = None,
    budget: Mapping[str, float] | None = None,
    agent_trusted: bool = True,
) -> Iterator[tuple[Speedrun, display.RunProgress]]:
    """With a progress bar; closed at the end, whatever comes."""
    env = Speedrun(tier, sandbox=sandbox, state_dir=state_dir, budget=budget or None, agent_trusted=agent_trusted)
    try:
        with display.watch(env) as progress:
            yield env, progress
    finally:
        env.close()

"""Options that commands share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from nanogpt_env import display
from nanogpt_env.backends.local import SANDBOXES
from nanogpt_env.env import Speedrun, StepResult
from nanogpt_env.errors import ActionError, BackendError, JudgeError
from nanogpt_env.tables import JudgeSeat

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


JudgeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        help="NAME, NAME=veto or NAME=veto,KEY=VALUE, instead of the tier's judges; may be repeated.",
        metavar="NAME[=MODE][,KEY=VALUE]",
    ),
]


def seats_of(options: list[str] | None) -> list[JudgeSeat] | None:
    """Raises `BadParameter`; None where no option was given."""
    seats = []
    for option in options or ():
        first, *more = option.split(",")
        name, _, mode = first.partition("=")
        if mode not in ("", "veto", "advisory") or not all("=" in part for part in more):
            raise typer.BadParameter(f"a judge is NAME, NAME=advisory or NAME=veto, then ,KEY=VALUE, not {option!r}")
        if ":" in name:
            own_modules()
        given = dict(part.split("=", 1) for part in more)
        limits: dict[str, Any] = {key: given.pop(key) for key in ("tokens", "dollars") if key in given}
        try:
            seats.append(JudgeSeat(name=name, mode="veto" if mode == "veto" else "advisory", options=given, **limits))
        except ValidationError as error:
            raise typer.BadParameter(f"{option!r}: {error.errors()[0]['msg']}") from None
    return seats or None


def own_modules() -> None:
    """A class module:Class may lie in the folder that the command is called in."""
    sys.path.insert(0, os.getcwd())


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
    judges: list[JudgeSeat] | None = None,
) -> Iterator[tuple[Speedrun, display.RunProgress]]:
    """With a progress bar; closed at the end, whatever comes."""
    env = Speedrun(
        tier,
        sandbox=sandbox,
        state_dir=state_dir,
        budget=budget or None,
        agent_trusted=agent_trusted,
        judges=judges,
    )
    try:
        with display.watch(env) as progress:
            yield env, progress
    finally:
        env.close()


def step_of(env: Speedrun, action: dict[str, Any]) -> StepResult:
    """A step whose refusal is the user's mistake; as a dict, so that numbers out of range are refused too."""
    result = env.step(action)
    if kind := result[4].get("error"):
        if kind == "BackendError":
            raise BackendError(result[0]["text"])
        if kind == "JudgeError":
            raise JudgeError(result[0]["text"])
        raise ActionError(result[0]["text"])
    return result

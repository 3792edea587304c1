"""Options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nanogpt_env.backends.local import SANDBOXES

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

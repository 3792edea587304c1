"""The commands `nanogpt-env data ...`: the token shards that a tier needs."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from nanogpt_env import datasets, display
from nanogpt_env.cli_options import JsonOption, TierOption
from nanogpt_env.display import console, print_json, say
from nanogpt_env.errors import BackendError
from nanogpt_env.tiers import load_tier

data_app = typer.Typer(no_args_is_help=True, help="Fetch and check the token shards that a tier needs.")
INCOMPLETE = 1


@data_app.command("fetch")
def data_fetch(
    tier: TierOption,
    workers: Annotated[int, typer.Option(help="Shards at a time.", min=1, max=32)] = 4,
    as_json: JsonOption = False,
) -> int:
    """Get what is not here yet from the hub that the tier's corpus names, and check it. Goes on where it stopped."""
    corpus = _corpus(tier)
    try:
        with display.watch_bytes() as on_bytes:
            datasets.fetch(corpus, workers, on_bytes)
    except BackendError as error:
        way_out = "\n".join(["Without a way to the hub:", *corpus.copy_commands(tier)])
        raise BackendError(f"{error}\n{way_out}") from None
    return _report(corpus, tier, as_json)


@data_app.command("check")
def data_check(tier: TierOption, as_json: JsonOption = False) -> int:
    """Read every shard that the tier needs and hold it to its SHA-256. Exit code 1 unless all are there and whole."""
    return _report(_corpus(tier), tier, as_json)


@data_app.command("path")
def data_path(tier: TierOption) -> int:
    """Where fetched shards of the tier's corpus lie, or are to be put."""
    say(str(_corpus(tier).target))
    return 0


def _corpus(tier: str) -> datasets.Corpus:
    return datasets.Corpus(load_tier(tier, calibrated=False))


def _report(corpus: datasets.Corpus, tier: str, as_json: bool) -> int:
    with display.steps("checking", len(corpus.names)) as step:
        states = list(datasets.check(corpus, step))
    good = all(state.status in ("ok", "unchecked") for state in states)
    commands = [] if good else corpus.copy_commands(tier)
    if as_json:
        print_json({"ok": good, "folder": corpus.target, "shards": states, "copy": commands})
        return 0 if good else INCOMPLETE
    table = Table("shard", "status", "MB", "where", caption="" if good else "not complete")
    for state in states:
        status = f"{state.status}: {state.detail}" if state.detail else state.status
        table.add_row(state.name, status, f"{state.bytes / 1e6:.1f}", str(state.path.parent))
    console.print(table)
    if not good and corpus.hub:
        say(f"`nanogpt-env data fetch --tier {tier}` gets what is missing; delete what is damaged first. Or copy:")
        say("\n".join(commands))
    return 0 if good else INCOMPLETE

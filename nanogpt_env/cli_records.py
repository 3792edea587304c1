"""The commands `nanogpt-env records ...`: the public records of the speedrun."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from nanogpt_env import human, public_rules
from nanogpt_env.cli_options import JsonOption
from nanogpt_env.display import console, print_json, say

records_app = typer.Typer(no_args_is_help=True, help="The public records of the NanoGPT speedrun.")

TRACKS_HELP = f"{', '.join(human.FILES)}: the public tracks 1, 2 and 3, and a part of 1, timed again."
TrackOption = Annotated[str, typer.Option(help=TRACKS_HELP)]
HumanOption = Annotated[bool, typer.Option("--human-only", help="Without records that credit an AI system.")]
UNITS = {"wallclock_minutes": "minutes", "wallclock_seconds": "seconds", "steps": "steps"}


@records_app.command("list")
def records_list(
    track: TrackOption = "optimization",
    human_only: HumanOption = False,
    every: Annotated[bool, typer.Option("--every", help="Also rows that were no record.")] = False,
    as_json: JsonOption = False,
) -> int:
    """The records of a track as they fell; where rows state runs and a mean loss, judged again by the target rule."""
    table = _checked(lambda: human.load_table(track))
    judged = {row.record.number: row for row in public_rules.judge_again(table)}
    rows = [r for r in table.records if not (human_only and r.ai_system)] if every else table.curve(human_only)
    if as_json:
        again = {
            n: {"statistic": row.statistic, "passes": row.passes, "differs": row.differs} for n, row in judged.items()
        }
        content = [r.model_dump(mode="json") | {"judged_again": again.get(r.number)} for r in rows]
        print_json({"track": table.track, "metric": table.metric, "source": table.source, "records": content})
        return 0
    repo, commit = table.source["repo"], table.source["commit"][:10]
    shown = Table("#", "date", UNITS[table.metric], "technique", "rule", caption=f"{repo} at {commit}")
    for column in shown.columns[:3]:
        column.no_wrap = True
    for r in rows:
        shown.add_row(str(r.number), str(r.date or ""), f"{r.value:g}", _technique(r), _rule(judged.get(r.number)))
    console.print(shown)
    if differing := [str(n) for n, row in judged.items() if row.differs]:
        say(f"the table's own mark and the rule differ on {', '.join(differing)}")
    return 0


@records_app.command("show")
def records_show(
    selector: Annotated[str, typer.Argument(help="A number, a date, 'before DATE', 'after DATE' or 'latest'.")],
    track: TrackOption = "optimization",
    human_only: HumanOption = False,
    as_json: JsonOption = False,
) -> int:
    """One record: the best that the selector allows."""
    table = _checked(lambda: human.load_table(track))
    record = _checked(lambda: table.select(selector, human_only))
    if as_json:
        print_json(record.model_dump(mode="json"))
        return 0
    shown = Table(show_header=False)
    for name, value in record.model_dump(mode="json").items():
        if value not in (None, "", [], False):
            shown.add_row(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    console.print(shown)
    return 0


@records_app.command("plot")
def records_plot(
    output: Annotated[Path, typer.Argument(help="The picture to write, such as records.png.")],
    track: TrackOption = "optimization",
    human_only: HumanOption = False,
) -> int:
    """Draw the curve of a track's records over time. Needs matplotlib."""
    from nanogpt_env import plots

    table = _checked(lambda: human.load_table(track))
    plots.records(output, table, human_only)
    say(f"wrote {output}")
    return 0


def _checked(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _technique(r: human.PublicRecord) -> str:
    return (
        r.technique
        + (f" [{r.ai_system}]" if r.ai_system else "")
        + (" (newer torch)" if r.framework_upgrade_only else "")
    )


def _rule(row: public_rules.Judged | None) -> str:
    if row is None:
        return "no figures"
    return f"{'passes' if row.passes else 'fails'} ({row.statistic:.4f})"

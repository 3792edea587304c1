"""The commands about agents: `nanogpt-env play`, `compare`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from gymnasium.error import ResetNeeded
from rich.table import Table

from nanogpt_env import agents, display
from nanogpt_env.actions import parse_action
from nanogpt_env.agents.isolation import IsolatedAgent
from nanogpt_env.agents.remote import RemoteAgent
from nanogpt_env.cli_options import (
    BudgetOption,
    JsonOption,
    JudgeOption,
    SandboxOption,
    TierOption,
    budget_of,
    environment,
    own_modules,
    seats_of,
)
from nanogpt_env.compare import Entry, Summary, summarize
from nanogpt_env.compare import compare as compare_agents
from nanogpt_env.display import console, errors, print_json, say
from nanogpt_env.errors import ActionError
from nanogpt_env.tiers import load_tier
from nanogpt_env.tracks import Tier

_SPENT_ON = {
    "repeated": "on runs of a program run before",
    "numbers": "on programs with other numbers",
    "algorithm": "on other algorithms",
    "verification": "on verification",
}


def add_agent_commands(app: typer.Typer) -> None:
    app.command()(play)
    app.command()(compare)


def play(
    tier: TierOption = "nano-steps",
    agent: Annotated[str, typer.Option(help="Its name (`ladder`, `greedy`, ...), or module:Class.")] = "ladder",
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="KEY=VALUE, an argument of the agent's class; may be repeated.", metavar="KEY=VALUE"
        ),
    ] = None,
    budget: BudgetOption = None,
    output: Annotated[Path | None, typer.Option(help="Folder for ledger, summary and picture.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of an episode that was interrupted, to go on.")] = None,
    isolate: Annotated[bool, typer.Option("--isolate", help="Run the agent in a sandbox of its own.")] = False,
    network: Annotated[bool, typer.Option("--network", help="Let an isolated agent use the network.")] = False,
    listen: Annotated[
        Path | None, typer.Option(help="Socket to wait at for an agent in another user or container.")
    ] = None,
    judge: JudgeOption = None,
    sandbox: SandboxOption = "auto",
    as_json: JsonOption = False,
) -> int:
    """Let an agent play one episode: edits, training runs, submissions, verified rewards.

    What an agent module:Class gets verified is `trusted: false` unless it is isolated or comes to a socket: here it
    could do all that your user can.
    """
    if not isolate:  # what lies in this folder may be the agent's
        own_modules()
    make = _maker(agent, _options(options), isolate, network, listen)
    # what comes to a socket from this machine could disturb what is timed on it
    apart = isolate or (listen is not None and load_tier(tier).table.track == "steps")
    trusted = apart or (listen is None and agent in agents.AGENTS)
    if output:
        output.mkdir(parents=True, exist_ok=True)

    def announce(action: Any) -> None:
        if not as_json:
            console.print(f"> {_name(action)}", style="bold")

    with environment(tier, sandbox, output, budget_of(budget), trusted, seats_of(judge)) as (env, progress):

        def tell(name: str, text: str, reward: float) -> None:
            progress.clear()
            if not as_json:
                say(text if name in ("run", "submit", "stop") else text.strip().split("\n")[0])

        player = make(env.tier)
        try:
            if listen:
                errors.print(f"waiting for an agent at {listen}", markup=False)
            played = agents.play(env, player, tell, announce, resume)
        except BaseException:  # whatever an agent raises leaves an episode that can be gone on with
            with contextlib.suppress(ResetNeeded):  # none was begun
                env.leave()
                say(f"to go on: the same command with --resume {env.episode.folder}", errors)
            raise
        finally:
            if isinstance(player, IsolatedAgent | RemoteAgent):
                player.close()
        loaded = env.tier
    summary = {
        "tier": loaded.name,
        "agent": agent,
        "recovered": played.info["recovered"],
        "total_reward": played.total_reward,
        "best": played.info["best"],
        "unit": loaded.unit,
        "verdicts": played.verdicts,
        "budget": played.info["budget"],
        "verification_device_seconds": played.info["verification_device_seconds"],
        "ledger": played.info["ledger"],
        "picture": _picture(output or Path.cwd(), loaded, played.runs, played.verdicts),
    }
    if output:
        (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if as_json:
        print_json(summary)
    else:
        _print_summary(summary)
    return 0


def _maker(
    agent: str, options: dict[str, Any], isolate: bool, network: bool, listen: Path | None
) -> Callable[[Tier], agents.Agent]:
    if listen:
        if isolate:
            raise typer.BadParameter("give --isolate or --listen: an agent that comes to a socket is where it is")
        return lambda tier: RemoteAgent(tier, listen)
    if isolate:
        return lambda tier: IsolatedAgent(tier, agent, options, network)
    if network:
        raise typer.BadParameter("--network is for --isolate: an agent that is not isolated has it anyway")
    return agents.find_agent(agent, options)


def _options(given: list[str] | None) -> dict[str, Any]:
    """Values are JSON where they can be, else text."""
    found: dict[str, Any] = {}
    for option in given or ():
        key, separator, value = option.partition("=")
        if not (separator and key.isidentifier()):
            raise typer.BadParameter(f"an argument of an agent is KEY=VALUE, not {option!r}")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _name(action: Any) -> str:
    try:
        return parse_action(action).type
    except ActionError:
        return "malformed"  # the environment tells the agent why


def _picture(folder: Path, tier: Tier, runs: list[dict[str, Any]], verdicts: list[dict[str, Any]]) -> str:
    from nanogpt_env import plots

    path = folder / f"{tier.name}-episode.png"
    try:
        plots.episode(path, tier, runs, verdicts)
    except ImportError:
        errors.print("no picture: it needs matplotlib (pip install 'nanogpt_env[plot]')", markup=False)
        return ""
    return str(path)


def _print_summary(summary: dict[str, Any]) -> None:
    table = Table("submission", "claim", "verdict", "reruns", "trusted", title="verified submissions")
    for v in summary["verdicts"]:
        state = "accepted" if v["accepted"] else "rejected"
        table.add_row(v["submission"], _claim(v), state, str(v["n"]), str(v["trusted"]).lower())
    console.print(table)
    used = summary["budget"]["device_seconds"]["spent"]
    say(
        f"frontier {summary['best']:.4g} {summary['unit']}, recovered {summary['recovered']:.3f} of the human speedup\n"
        f"device_seconds: {used:.1f} for runs, {summary['verification_device_seconds']:.1f} for verification\n"
        f"ledger: {summary['ledger']}\npicture: {summary['picture'] or 'none'}"
    )


def _claim(verdict: dict[str, Any]) -> str:
    """Steps that were claimed, or how the time compares with the start record's."""
    if verdict["claim"] is not None:
        return str(verdict["claim"])
    return f"time x {verdict['time']['ratio']:.3f}" if verdict["time"] else "undecided time"


def compare(
    tier: TierOption = "nano-steps",
    names: Annotated[str, typer.Option("--agents", help="With commas between; names as for `play`.")] = "random,greedy",
    episodes: Annotated[int, typer.Option(min=1, help="Of each agent.")] = 8,
    budget: BudgetOption = None,
    at_once: Annotated[int, typer.Option(min=1, help="Episodes at a time: as many as there are free cores.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder for episodes, summary and picture.")] = Path("compare-output"),
    sandbox: SandboxOption = "auto",
    as_json: JsonOption = False,
) -> int:
    """Let agents play the same tier at the same budget, in turn: mean recovered with confidence intervals.

    Interrupted, it continues where it stopped: episodes that have ended are kept in the output folder.
    """
    own_modules()
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    with display.watch_counts() as counts:
        entries = compare_agents(tier, chosen, episodes, output, budget_of(budget), sandbox, at_once, counts)
    rows = summarize(entries)
    picture = output / "compare.png"
    try:
        from nanogpt_env import plots

        plots.comparison(picture, entries)
    except ImportError:
        errors.print("no picture: it needs matplotlib (pip install 'nanogpt_env[plot]')", markup=False)
        picture = Path()
    summary = {
        "tier": entries[0].tier,
        "budget": entries[0].budget,
        "agents": [row.model_dump() for row in rows],
        "picture": str(picture) if picture.name else "",
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if as_json:
        print_json(summary)
        return 0
    _print_comparison(rows, entries)
    say(f"episodes: {output / 'episodes.jsonl'}\npicture: {picture if picture.name else 'none'}")
    return 0


def _print_comparison(rows: list[Summary], entries: list[Entry]) -> None:
    table = Table("agent", "recovered", "95 % of the mean", "accepted", "runs", "device-s")
    for row in rows:
        interval = f"{row.interval[0]:+.3f} to {row.interval[1]:+.3f}" if row.interval else "one episode"
        accepted, used = f"{row.accepted:.1f} of {row.submissions:.1f}", sum(row.device_seconds.values())
        cells = (f"{row.recovered:+.3f}", interval, accepted, f"{sum(row.runs.values()):.1f}", f"{used:.0f}")
        table.add_row(row.agent, *cells)
    console.print(table)
    for row in rows:
        parts = ", ".join(f"{s:.0f} s {_SPENT_ON[kind]}" for kind, s in row.device_seconds.items() if s)
        say(f"{row.agent}: best {row.best:+.3f}; {parts}; idle {row.idle_seconds:.0f} of {row.wall_seconds:.0f} s")
    if not all(e.trusted for e in entries):
        say("trusted: false for some: no sandbox (`nanogpt-env doctor`), or an agent that could run code as this user")

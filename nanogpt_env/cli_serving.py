"""`nanogpt-env mcp` and `attach`: episodes for agents that are no Python."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nanogpt_env.cli_options import (
    BudgetOption,
    JsonOption,
    JudgeOption,
    SandboxOption,
    TierOption,
    budget_of,
    environment,
    seats_of,
    step_of,
)
from nanogpt_env.content import state_dir
from nanogpt_env.display import errors, print_json, say
from nanogpt_env.env import Speedrun
from nanogpt_env.errors import ActionError
from nanogpt_env.ledger import write_whole
from nanogpt_env.report import state_text
from nanogpt_env.serving.attach import Checkout
from nanogpt_env.serving.room import Room
from nanogpt_env.tables import JudgeSeat

ApartOption = Annotated[
    bool,
    typer.Option(
        "--apart",
        help="The agent has another user, or a container of its own: what it gets verified may be trusted "
        "(docs/coding-agents.md).",
    ),
]
DEFAULT_NAME = "default"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def add_serving_commands(app: typer.Typer) -> None:
    app.command()(mcp)
    app.command()(attach)


def mcp(
    tier: TierOption = "nano-steps",
    http: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Serve there instead of on standard input and output.")
    ] = None,
    episodes: Annotated[
        str, typer.Option(help="Names of episodes, with commas between: over HTTP each is at /NAME/mcp.")
    ] = DEFAULT_NAME,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the episodes, which are gone on with if they are there.")
    ] = None,
    no_token: Annotated[bool, typer.Option("--no-token", help="On a loopback address: let in who comes.")] = False,
    apart: ApartOption = False,
    budget: BudgetOption = None,
    judge: JudgeOption = None,
    sandbox: SandboxOption = "auto",
    as_json: JsonOption = False,
) -> int:
    """Serve an episode to a coding agent by the Model Context Protocol.

    Ended or interrupted, the same command goes on with the same episodes.
    """
    names = [name.strip() for name in episodes.split(",")]
    if bad := [name for name in names if not _NAME.fullmatch(name)] or (len(set(names)) < len(names)):
        raise typer.BadParameter(f"names of episodes are letters, digits, '.', '_', '-', and differ: {bad}")
    if not http and (len(names) > 1 or no_token or as_json):
        raise typer.BadParameter("several episodes, --no-token and --json are for --http")
    folder = output or state_dir() / "mcp" / Path(tier).name

    def make(where: Path) -> Speedrun:
        return Speedrun(
            tier,
            sandbox=sandbox,
            state_dir=where,
            budget=budget_of(budget) or None,
            agent_trusted=apart,
            judges=seats_of(judge),
        )

    try:
        from nanogpt_env.serving import http as web
        from nanogpt_env.serving import mcp as tools
    except ImportError as error:
        raise ActionError(f"{error}: pip install 'nanogpt_env[mcp]'") from None
    host, port = _address(http) if http else ("", 0)
    if no_token and not web.is_loopback(host):
        raise typer.BadParameter("--no-token is for loopback addresses such as 127.0.0.1")
    with contextlib.ExitStack() as stack:
        at = stack.enter_context(web.listen(host, port)) if http else None
        rooms = {name: _opened(stack, make, folder / name) for name in names}
        if at is None:
            _over_stdio(rooms[names[0]], tools.serve(rooms[names[0]]))
            return 0
        doors = {
            name: web.Door(tools.serve(room), None if no_token else _token(folder / name / "token"))
            for name, room in rooms.items()
        }
        port = at.getsockname()[1]
        shown = [
            {"episode": name, "url": f"http://{_quoted(host)}:{port}/{name}/mcp", "token": door.token}
            for name, door in doors.items()
        ]
        if as_json:
            print_json(shown)
        for line in () if as_json else shown:
            say(f"{line['url']}" + (f"   Authorization: Bearer {line['token']}" if line["token"] else ""))
        web.run(web.application(doors, host), at)
    return 0


def _over_stdio(room: Room, server: Any) -> None:
    errors.print(f"serving {room.env.episode.folder}", markup=False, soft_wrap=True)
    try:
        server.run("stdio")
    except KeyboardInterrupt:  # a thread still waits for the client's next line: nothing ends it but the process
        room.close()
        errors.print("interrupted; nothing is left running")
        os._exit(130)


def _opened(stack: contextlib.ExitStack, make: Any, folder: Path) -> Room:
    room = Room.open(make, folder)
    stack.callback(room.close)
    return room


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise typer.BadParameter(f"--http is HOST:PORT, such as 127.0.0.1:8765, not {text!r}")
    return host.strip("[]"), int(port)


def _quoted(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _token(path: Path) -> str:
    """The episode's, kept for the next time."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8").strip()
    token = secrets.token_urlsafe(24)
    write_whole(path, f"{token}\n")
    return token


def attach(
    folder: Annotated[Path, typer.Argument(help="To be kept in step with an episode.", show_default=False)],
    action: Annotated[
        Literal["sync", "run", "submit", "status", "stop"], typer.Argument(help="What to do with it.")
    ] = "sync",
    tier: Annotated[str | None, typer.Option(help="Of a new episode; nano-steps by default.")] = None,
    horizon: Annotated[int | None, typer.Option(min=1, help="Schedule length.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Where a run stops.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Repeat a run exactly.")] = None,
    claim: Annotated[int | None, typer.Option(min=1, help="Steps that a submission claims.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where a new episode's ledger goes.")] = None,
    budget: BudgetOption = None,
    judge: JudgeOption = None,
    sandbox: SandboxOption = "auto",
    as_json: JsonOption = False,
) -> int:
    """Keep a folder in step with an episode: edit the files there, then `run` and `submit`.

    The first call makes the folder and the episode. Each call takes the files in as they are, does what it is asked
    to, and leaves the episode for the next one. What is verified so is `trusted: false`.
    """
    checkout = Checkout(folder)
    known = checkout.known()
    if known and (tier or output or budget or judge):
        begun = f"is attached to an episode of {known['tier']}"
        raise ActionError(f"{folder} {begun}, which keeps its tier, output, budget and judges")
    if not known and action != "sync":
        raise ActionError(
            f"{folder} is not attached: `nanogpt-env attach {folder} --tier TIER` begins an episode there"
        )
    tier = known.get("tier") or tier or "nano-steps"
    seats = [JudgeSeat(**seat) for seat in known["judges"]] if known else seats_of(judge)
    with environment(tier, sandbox, output, budget_of(budget), False, seats) as (env, _):
        if known:
            checkout.go_on(env, Path(known["episode"]))
        else:
            checkout.begin(env, tier)
        try:
            changed = checkout.sync(env, lambda a: step_of(env, a))
            text, info = _act(env, action, {"horizon": horizon, "steps": steps, "seed": seed, "claim": claim})
        finally:
            if not env.episode.over:
                env.leave()
    if not known:
        names = ", ".join(env.tier.files)
        text += f"\nedit {names} in {folder}, then: nanogpt-env attach {folder} run"
    if as_json:
        print_json({"folder": str(folder), "changed": changed, "text": text, **info})
    else:
        say("\n".join(part for part in (f"took in {', '.join(changed)}" if changed else "", text) if part))
    return 0


def _act(env: Speedrun, action: str, options: dict[str, int | None]) -> tuple[str, dict[str, Any]]:
    given = {key: value for key, value in options.items() if value is not None}
    takes = {"run": {"horizon", "steps", "seed"}, "submit": {"horizon", "claim"}}.get(action, set())
    if wrong := sorted(given.keys() - takes):
        raise typer.BadParameter(f"{action} takes no --{', --'.join(wrong)}")
    if action in ("sync", "status"):
        return state_text(env.episode), {"recovered": env.episode.recovered, "budget": env.episode.budget.status()}
    observation, reward, _, _, info = step_of(env, {"type": action, **given})
    return observation["text"], {**info, "reward": reward}

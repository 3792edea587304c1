"""The command `nanogpt-env`: thin, on top of everything. Exit codes: 0 done or accepted, 1 rejected, 2 misuse
or broken input, 3 our side failed, 130 interrupted."""

from __future__ import annotations

import importlib.metadata
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.table import Table

from nanogpt_env import display
from nanogpt_env.cli_agents import add_agent_commands
from nanogpt_env.cli_data import data_app
from nanogpt_env.cli_host import add_host_commands
from nanogpt_env.cli_judge import judge_app
from nanogpt_env.cli_options import (
    DirArgument,
    JsonOption,
    JudgeOption,
    SandboxOption,
    TierOption,
    environment,
    seats_of,
    step_of,
)
from nanogpt_env.cli_records import records_app
from nanogpt_env.cli_serving import add_serving_commands
from nanogpt_env.cli_tiers import tiers_app
from nanogpt_env.display import console, errors, print_json, say
from nanogpt_env.env import Speedrun
from nanogpt_env.errors import ActionError, BackendError, JudgeError, NanoGPTError
from nanogpt_env.tiers import load_tier
from nanogpt_env.tracks import StepsTier

REJECTED, MISUSE, OURS, INTERRUPTED = 1, 2, 3, 130
SCOUT_RUNS = 5

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="The NanoGPT speedrun as a Gymnasium environment. Try: nanogpt-env play --tier nano-steps --agent ladder",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(importlib.metadata.version("nanogpt_env"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


app.add_typer(tiers_app, name="tiers")
app.add_typer(records_app, name="records")
app.add_typer(data_app, name="data")
app.add_typer(judge_app, name="judge")
add_host_commands(app)
add_agent_commands(app)
add_serving_commands(app)


def main() -> NoReturn:
    """Entry point: turns errors into a message and an exit code; Ctrl-C and SIGTERM leave nothing running."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except JudgeError as error:
        code = _fail(error, REJECTED)
    except BackendError as error:
        code = _fail(error, OURS)
    except (NanoGPTError, OSError) as error:
        code = _fail(error, MISUSE)
    except Exception as error:
        if not hasattr(error, "format_message"):  # not one of click's usage errors
            raise
        message = error.format_message()
        code = _fail(message, MISUSE) if message else MISUSE  # none: the help was printed
    if code == INTERRUPTED:  # some versions of typer make this of a KeyboardInterrupt themselves
        errors.print("interrupted; nothing is left running")
    sys.exit(code or 0)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(error: object, code: int) -> int:
    if "--json" in sys.argv:
        print_json({"error": str(error), "exit_code": code} | ({"accepted": False} if code == REJECTED else {}))
    say(f"nanogpt-env: {error}", errors)
    return code


def _load(env: Speedrun, folder: Path) -> None:
    """Put the folder's files into the workspace of a fresh episode."""
    files = env.tier.files
    if folder.is_file():
        raise typer.BadParameter(f"{folder} is a file; give the folder that it is in")
    for name in files:
        if not (folder / name).is_file():
            hint = f"`nanogpt-env new FOLDER --tier {env.tier.name}` makes one"
            raise typer.BadParameter(f"{folder} has no {name}, which {env.tier.name} asks for; {hint}")
    others = sorted(p.name for p in folder.glob("*.py") if p.name not in files)
    if others:
        errors.print(f"only {', '.join(files)} is part of a candidate; not used: {', '.join(others)}")
    env.reset()
    for name in files:
        if (size := (folder / name).stat().st_size) > env.tier.table.limits.source_bytes:
            raise ActionError(f"{name} may have {env.tier.table.limits.source_bytes} bytes, this has {size}")
        try:
            text = (folder / name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise typer.BadParameter(f"{folder / name} is not UTF-8 text: {error}") from None
        step_of(env, {"type": "write_file", "path": name, "text": text})


@app.command()
def new(
    folder: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    tier: TierOption,
    record: Annotated[str | None, typer.Option(help="Which of the tier's records. Default: its start record.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Make a folder with one of the tier's records to edit, and the task."""
    loaded = load_tier(tier, calibrated=False)
    sources = loaded.record(record or loaded.table.reward.start).sources
    if folder.exists() and any(folder.iterdir()):
        raise typer.BadParameter(f"{folder} exists and is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    files = {**sources, "task.md": loaded.task}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    if as_json:
        print_json({"folder": str(folder), "files": list(files)})
        return 0
    say(f"{folder}: edit {', '.join(sources)}, then: nanogpt-env run {folder} --tier {tier}")
    return 0


@app.command()
def run(
    folder: DirArgument,
    tier: TierOption,
    steps: Annotated[int | None, typer.Option(min=1, help="Where to stop. Default: the horizon.")] = None,
    horizon: Annotated[
        int | None, typer.Option(min=1, help="Schedule length. Default: --steps, else the start record's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Repeat a run exactly. Default: a fresh seed.")] = None,
    sandbox: SandboxOption = "auto",
    as_json: JsonOption = False,
) -> int:
    """Train a candidate once, with validation on the public shard."""
    with environment(tier, sandbox) as (env, _):
        _load(env, folder)
        observation, _, _, _, info = step_of(env, {"type": "run", "horizon": horizon, "steps": steps, "seed": seed})
    if as_json:
        print_json({"tier": env.tier.name, **info["run"]})
    else:
        say(observation["text"])
    return 0 if info["run"]["exit_reason"] == "completed" else REJECTED


@app.command()
def submit(
    folder: DirArgument,
    tier: TierOption,
    claim: Annotated[int | None, typer.Option(min=1, help="Steps. Default: what a few runs support.")] = None,
    horizon: Annotated[
        int | None, typer.Option(min=1, help="Schedule length. Default: the claim, else the start record's.")
    ] = None,
    judge: JudgeOption = None,
    sandbox: SandboxOption = "auto",
    as_json: JsonOption = False,
) -> int:
    """Verify a candidate at its claim (steps track), or as faster than the start record (wallclock track).

    Exit code 0: accepted, 1: rejected. Each call is an episode of its own: the error level holds for a call, not over
    repeated ones.
    """
    with environment(tier, sandbox, judges=seats_of(judge)) as (env, progress):
        _load(env, folder)
        if isinstance(env.tier, StepsTier):
            horizon = horizon or claim or env.tier.record(env.tier.table.reward.start).horizon
            if claim is None:
                errors.print(
                    f"no --claim: running the candidate at horizon {horizon} (--horizon) until its runs support one"
                )
                _scout(env, horizon, progress)
        observation, reward, _, _, info = step_of(env, {"type": "submit", "claim": claim, "horizon": horizon})
    verdict = info["verdict"]
    if as_json:
        print_json({**verdict, "reward": reward, "recovered": info["recovered"], "ledger": info["ledger"]})
    else:
        say(f"{observation['text']}\nledger: {info['ledger']}")
    return 0 if verdict["accepted"] else REJECTED


def _scout(env: Speedrun, horizon: int, progress: display.RunProgress) -> None:
    """Run the candidate until its runs support a claim."""
    sources = dict(env.workspace.files)
    for i in range(SCOUT_RUNS):
        observation, _, _, _, info = step_of(env, {"type": "run", "horizon": horizon})
        if info["run"]["exit_reason"] != "completed":
            raise JudgeError(f"the candidate's run did not complete\n{observation['text']}")
        advice = env.episode.advice(sources, horizon)
        if advice.claim is not None:
            return
        progress.clear()
        errors.print(f"run {i + 1}: {advice.text}", markup=False)
        if advice.hopeless:
            break
    raise JudgeError(f"no claim can be made: {advice.text}")


@app.command()
def replay(
    ledger: Annotated[Path, typer.Argument(help="A ledger.jsonl, or the folder of an episode, or of one only.")],
    as_json: JsonOption = False,
) -> int:
    """Recompute every verdict and reward of a ledger. Exit code 1 if they differ from what was recorded."""
    from nanogpt_env.replay import replay as recompute

    found = recompute(ledger)
    if as_json:
        print_json(asdict(found))
    else:
        table = Table("submission", "claim", "horizon", "accepted", "n", "reward")
        for s in found.submissions:
            cells = (s["submission"], s["claim"], s["horizon"], s["accepted"], s["n"], f"{s['reward']:+.4f}")
            table.add_row(*map(str, cells))
        console.print(table)
        console.print(f"{found.tier}: best {found.best:.4g}, recovered {found.recovered:.4f}")
        for line in (*found.notes, *found.differences):
            say(f"! {line}")
    return REJECTED if found.differences else 0

"""The commands that are about this host: `nanogpt-env doctor`, `attack`, `image`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from nanogpt_env import attacks, content, display
from nanogpt_env.backends.local import LocalBackend, sandbox_report
from nanogpt_env.cli_options import JsonOption, SandboxOption
from nanogpt_env.display import console, print_json, say
from nanogpt_env.errors import BackendError
from nanogpt_env.gpus import usable_gpus
from nanogpt_env.slots import Slots
from nanogpt_env.testing import Conformance, check_backend
from nanogpt_env.tiers import tier_folders
from nanogpt_env.trap import Trap, validation_files

FAILED = 1


def add_host_commands(app: typer.Typer) -> None:
    app.command()(doctor)
    app.command()(attack)
    app.command()(image)


def doctor(
    check: Annotated[bool, typer.Option(help="Run probes in each sandbox, some seconds each.")] = True,
    as_json: JsonOption = False,
) -> int:
    """Say what this machine can do, and how to get more."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "nanogpt_env": importlib.metadata.version("nanogpt_env"),
        "torch": _version("torch"),
        "cores": os.cpu_count(),
        "cache": str(content.cache_dir()),
        "state": str(content.state_dir()),
        "sandboxes": sandbox_report(),
        "gpus": usable_gpus(),
        "slots": Slots("doctor").status(),
        "tiers": list(tier_folders()),
    }
    offered = found["sandboxes"]["sandboxes"]
    checked = _check([name for name in offered if offered[name]["available"]]) if check and found["torch"] else {}
    found["checks"] = {name: report.as_dict() for name, report in checked.items()}
    found["advice"] = _advice(found)
    if as_json:
        print_json(found)
    else:
        _print_host(found, checked)
    return FAILED if not found["torch"] or not all(report.ok for report in checked.values()) else 0


def _check(names: list[str]) -> dict[str, Conformance]:
    found = {}
    for name in names:
        with display.steps(f"checking {name}", 2) as step, closing(LocalBackend(name)) as backend:
            found[name] = check_backend(backend, quick=True, on_check=step)
    return found


def _advice(found: dict[str, Any]) -> list[str]:
    sandboxes, advice = found["sandboxes"], []
    if not found["torch"]:
        advice.append("install PyTorch for your CPU or GPU (README, 'Install'): without it nothing trains")
    if sandboxes["auto"] == "plain":
        advice += [f"{name}: {box['reason']}" for name, box in sandboxes["sandboxes"].items() if box["reason"]]
        advice.append(sandboxes["how_to_trust"])
    if sys.platform.startswith("linux") and not sandboxes["cgroups"]["available"]:
        advice.append(f"no limits by control groups, so rlimits only: {sandboxes['cgroups']['reason']}")
    return advice


def _print_host(found: dict[str, Any], checked: dict[str, Conformance]) -> None:
    table = Table(show_header=False)
    for key in ("python", "nanogpt_env", "torch", "cores", "cache", "state"):
        table.add_row(key, str(found[key] or "missing"))
    table.add_row("tiers", ", ".join(found["tiers"]))
    table.add_row("GPUs", "\n".join(found["gpus"]) or "none")
    table.add_row("slots", "\n".join(map(_slot, found["slots"])) or "all cores free")
    sandboxes = found["sandboxes"]
    warm, groups = sandboxes["warm_starts"], sandboxes["cgroups"]
    table.add_row("warm starts", "available" if warm["available"] else f"not available: {warm['reason']}")
    table.add_row("control groups", f"version {groups['version']}" if groups["available"] else "not available")
    table.add_row("sandbox auto", sandboxes["auto"])
    console.print(table)
    boxes = Table("sandbox", "trusted", "checks", "a run of 4 steps", "not here because, or open")
    for name, box in sandboxes["sandboxes"].items():
        report = checked.get(name)
        held = f"{sum(c.outcome == 'held' for c in report.checks)} of {len(report.checks)} held" if report else ""
        seconds = f"{min(report.start_s):.1f} s" if report else ""
        other = ", ".join(c.name for c in report.checks if c.outcome != "held") if report else box["reason"]
        boxes.add_row(name, "yes" if box["trusted"] else "no", held, seconds, other)
    console.print(boxes)
    for line in found["advice"]:
        say(f"- {line}")


def _slot(row: dict[str, Any]) -> str:
    what = "waits for a core" if row["core"] is None else f"core {row['core']}"
    timed = ", a timed session" if row["exclusive"] else ""
    return f"{what}: environment {row['owner']}, process {row['pid']}{timed}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def attack(
    sandbox: SandboxOption = "auto",
    only: Annotated[str, typer.Option(help="Cases whose name contains this.")] = "",
    naive: Annotated[
        bool, typer.Option(help="Run them by the naive scorer, too: on this machine, outside of any sandbox.")
    ] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="Every fifth case and the honest controls, no whole submissions.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Run hostile and honest candidates on this host, and say what became of each. Exit code 1 if one got through."""
    cases = [case for case in attacks.load_cases() if only in case.name]
    if fast:
        short = [case for case in cases if case.track != "submissions"]
        cases = [case for i, case in enumerate(short) if case.honest or i % 5 == 0]
    if not cases:
        raise typer.BadParameter(f"no case has {only!r} in its name")
    corpus = content.content_root() / "gpu_backend" / "corpora"
    outcomes = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Trap(validation_files(corpus)) as trap,
        closing(LocalBackend(sandbox, warm=True)) as backend,
        display.steps(f"attacks on {sandbox}", len(cases)) as step,
    ):
        suite = attacks.Suite(backend, trap, Path(folder), naive)
        for case in cases:
            step(case.name)
            outcomes.append(suite.run(case))
        kind = backend.kind()
    outcomes += [bounded.outcome() for bounded in attacks.load_bounded() if only in bounded.name]
    bad = [o for o in outcomes if o.verdict in attacks.BAD]
    if as_json:
        print_json({"sandbox": kind, "outcomes": [o.model_dump() for o in outcomes], "ok": not bad})
    else:
        table = Table("case", "verdict", "detail", *(["naive scorer"] if naive else []), title=f"sandbox: {kind}")
        for o in outcomes:
            table.add_row(o.case, o.verdict, o.detail, *([o.naive or "not fooled"] if naive else []))
        console.print(table)
        say(attacks.summary(outcomes))
    return FAILED if bad else 0


def image(
    variant: Annotated[str, typer.Argument(help="host, cpu or cuda.")] = "host",
    base: Annotated[str, typer.Option(help="Image that a cpu or cuda one is built on.")] = "",
    pip_options: Annotated[
        str, typer.Option(help="For pip, such as the index of the torch builds that you want.")
    ] = "",
) -> int:
    """Build the image in which the `docker` sandbox runs candidates. `host`: an empty one, with this Python mounted."""
    script = content.content_root() / "gpu_backend" / "container.py"
    command = [sys.executable, str(script), variant, "--base", base, f"--pip-options={pip_options}"]
    if subprocess.run(command, check=False).returncode:
        raise BackendError("the image was not built")
    return 0

"""The commands `nanogpt-env tiers ...`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from nanogpt_env import display
from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.backends.queued import Queued
from nanogpt_env.cli_options import JsonOption, SandboxOption
from nanogpt_env.display import console, errors, print_json, say
from nanogpt_env.errors import TierError
from nanogpt_env.tables import Calibration, StepsCalibration
from nanogpt_env.tiers import (
    CALIBRATION,
    check_values,
    host_timing_path,
    load_calibration,
    load_tier,
    tier_folders,
    write_calibration,
)
from nanogpt_env.tracks import StepsTier, Tier, WallclockTier

tiers_app = typer.Typer(no_args_is_help=True, help="List, show and calibrate tiers.")


@tiers_app.command("list")
def tiers_list(as_json: JsonOption = False) -> int:
    """The tiers that have a name here."""
    rows, unusable = [], []
    for folder in tier_folders().values():
        try:
            rows.append(_tier_row(load_tier(folder)))
        except TierError as error:
            unusable.append(str(error))
    for reason in unusable:
        errors.print(f"not usable: {reason}", markup=False, soft_wrap=True)
    if as_json:
        print_json({"tiers": rows, "unusable": unusable})
        return 0
    caption = "values: start -> anchor, in steps or as a share of the start's time; FLOPs of a start run"
    table = Table("tier", "values", "FLOPs", "summary", caption=caption)
    for column in table.columns[:3]:
        column.no_wrap = True
    for row in rows:
        values = f"{row['start']['value']:.4g} -> {row['anchor']['value']:.4g}"
        table.add_row(row["tier"], values, f"{row['start_flops']:.1e}", row["summary"])
    console.print(table)
    return 0


def _tier_row(tier: Tier) -> dict[str, Any]:
    span = tier.span()
    if isinstance(tier, StepsTier):
        tokens = span.start_value * tier.tokens_per_step()
    else:
        tokens = tier.most(None)["tokens"]
    return {
        "tier": tier.name,
        "track": tier.table.track,
        "summary": tier.table.summary,
        "start": {"record": span.start, "value": span.start_value},
        "anchor": {"record": span.anchor, "value": span.anchor_value},
        "cautions": span.cautions,
        "start_flops": tokens * tier.flops_per_token(),
    }


@tiers_app.command("show")
def tiers_show(tier: Annotated[str, typer.Argument(help="Name or path.")], as_json: JsonOption = False) -> int:
    """A tier's settings, ladder and calibration."""
    loaded = load_tier(tier)
    c = loaded.measured
    if as_json:
        calibration = c.model_dump(exclude={"evidence"})
        print_json({**_tier_row(loaded), "settings": loaded.table.model_dump(), "calibration": calibration})
        return 0
    say(f"{loaded.name}: {loaded.table.summary}\n{loaded.folder}")
    if isinstance(loaded, StepsTier):
        _show_steps(loaded)
    elif isinstance(loaded, WallclockTier):
        _show_wallclock(loaded)
    if loaded.table.human:
        span = loaded.span()
        say(
            f"from public record {span.start}, {loaded.format(span.start_value)}, to {span.anchor}, "
            f"{loaded.format(span.anchor_value)}"
        )
    say(
        f"target {loaded.table.training.target:g} nats, sigma {c.sigma:.4f}, level {loaded.level():g} per submission, "
        f"boundary {c.boundary:g}"
    )
    return 0


def _show_steps(tier: StepsTier) -> None:
    table = Table("record", "steps to target", "value", "horizon", "technique")
    for column in table.columns[:4]:
        column.no_wrap = True
    for name, record in tier.records.items():
        m = tier.measured.records.get(name)
        value = f"{m.value:g} ± {m.value_error:.1f}" if m and m.value else ""
        steps = f"{m.steps_mean:.1f} ± {m.steps_sd:.1f}" if m else "-"
        table.add_row(name, steps, value, str(record.horizon), record.technique)
    console.print(table)
    c = tier.measured
    say(f"public - hidden shard {c.shard_offset:+.4f} ± {c.shard_offset_error:.4f}")


def _show_wallclock(tier: WallclockTier) -> None:
    table = Table("record", "time / start's", "value", "loss", "power", "tokens", "technique")
    for column in table.columns[:6]:
        column.no_wrap = True
    for name, record in tier.records.items():
        if m := tier.measured.records.get(name):
            ratio = math.exp(tier.timing.log_ratios.get(name, 0.0))
            measured = f"{m.loss_mean:.4f}", f"{m.power:.2f}", f"{m.tokens:,}"
            table.add_row(name, f"{ratio:.3f}", f"{tier.value_of(name):.3f}", *measured, record.technique)
        else:
            table.add_row(name, *["-"] * 5, record.technique)
    console.print(table)
    where = "this host" if tier.timing is tier.host else "the calibration (`tiers time` measures this host)"
    say(f"times from {where}: sd of a pair {tier.timing.pair_sd:.2%}, {tier.pair_test().pairs} pairs")
    if floor := tier.measured.table_floor:
        say(f"table floor {floor['bigrams']:.3f} nats, {floor['finished']:.3f} after a short finish")


@tiers_app.command("plan")
def tiers_plan(
    flops: Annotated[float, typer.Argument(help="Of one run of the start record, such as 1e16.", show_default=False)],
    hardware: Annotated[str, typer.Option(help="A profile (cpu, h100, h200) or the file of one.")] = "cpu",
    gpus: Annotated[int, typer.Option(min=1, help="Devices; of a CPU, cores.")] = 1,
    corpus: Annotated[str, typer.Option(help="shakespeare or fineweb10B. Default: the former below 1e14 FLOPs.")] = "",
    output: Annotated[Path | None, typer.Option(help="Folder to make. Default: steps-FLOPS, here.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the plan, write nothing.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Propose a tier of the optimizer track for a FLOP budget: model, tokens, batch, target, time and memory; write its
    folder, to be calibrated."""
    from nanogpt_env import planning
    from nanogpt_env.hardware import load_hardware

    plan = planning.plan(flops, load_hardware(hardware), gpus, corpus)
    folder = output or Path(f"steps-{flops:.0e}".replace("+", ""))
    if not dry_run:
        planning.write_tier(plan, folder)
    if as_json:
        print_json({"folder": None if dry_run else folder, "plan": plan.model_dump()})
        return 0
    table = Table(show_header=False)
    for name, value in plan.summary().items():
        table.add_row(name, value)
    console.print(table)
    for line in plan.extrapolated:
        say(f"extrapolated: {line}")
    if not dry_run:
        fetch = f"nanogpt-env data fetch --tier {folder}\n" if plan.family.corpus == planning.FINEWEB.corpus else ""
        say(f"wrote {folder}. Next:\n{fetch}nanogpt-env tiers calibrate {folder}")
    return 0


@tiers_app.command("calibrate")
def tiers_calibrate(
    tier: Annotated[str, typer.Argument(help="Name or path.")],
    seeds: Annotated[int, typer.Option(min=3, help="Fresh seeds per record of the ladder.")] = 5,
    reruns: Annotated[int, typer.Option(min=5, help="Reruns that value start and anchor.")] = 20,
    value: Annotated[list[str] | None, typer.Option(help="Value this record too; may be repeated.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time; each takes one core.")] = 1,
    sessions: Annotated[int, typer.Option(min=2, help="Wallclock tiers: sessions of pairs of start and anchor.")] = 2,
    fresh: Annotated[bool, typer.Option(help="Forget the finished runs of an earlier calibration.")] = False,
    retime: Annotated[bool, typer.Option(help="Wallclock tiers: run the sessions of pairs anew, no more.")] = False,
    recompute: Annotated[
        bool, typer.Option(help="After a change of target, verification or budget: reuse the losses, train nothing.")
    ] = False,
    published: Annotated[
        bool, typer.Option(help="Take the noise that env.toml cites as published: train nothing.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Print the calibration, write nothing.")] = False,
    sandbox: SandboxOption = "auto",
    as_json: JsonOption = False,
) -> int:
    """Measure a tier and write its calibration.json: ladder, values of start and anchor, sigma, boundary, power.

    Interrupted, it continues where it stopped.
    """
    loaded = load_tier(tier, calibrated=False)
    path = loaded.folder / CALIBRATION
    with _calibration_backend(loaded, sandbox) as (backend, counts):
        settings: dict[str, Any] = {"seeds": seeds, "reruns": reruns, "workers": workers, "fresh": fresh}
        measured: Calibration
        if published:
            from nanogpt_env import published as others

            measured = others.calibrate(loaded, counts)
        elif isinstance(loaded, StepsTier):
            from nanogpt_env import calibrate

            if retime:
                raise typer.BadParameter("--retime is for tiers of the wallclock track")
            if recompute:
                measured = calibrate.recompute(loaded, load_calibration(path, StepsCalibration), counts)
            else:
                measured = calibrate.calibrate(loaded, backend, value=value or (), report=counts, **settings)
        else:
            from nanogpt_env import calibrate_wallclock

            assert isinstance(loaded, WallclockTier)
            if recompute or value:
                raise typer.BadParameter("--recompute and --value are for tiers of the steps track")
            measured = calibrate_wallclock.calibrate(
                loaded, backend, sessions=sessions, retime=retime, report=counts, **settings
            )
    if not dry_run:
        write_calibration(path, measured)
        errors.print(f"wrote {path}")
    if as_json or dry_run:
        print_json(measured.model_dump(exclude={"evidence"}))
    return 0


@tiers_app.command("time")
def tiers_time(
    tier: Annotated[str, typer.Argument(help="Name or path of a wallclock tier.")],
    sessions: Annotated[int, typer.Option(min=2, help="Sessions of pairs, start against anchor.")] = 2,
    sandbox: SandboxOption = "auto",
    as_json: JsonOption = False,
) -> int:
    """Measure on this host how much times vary and how fast the anchor is; later episodes use it."""
    from nanogpt_env import calibrate_wallclock

    loaded = load_tier(tier, host=False)
    if not isinstance(loaded, WallclockTier):
        raise typer.BadParameter(f"{loaded.name} is a tier of the steps track: its scores do not depend on the host")
    with _calibration_backend(loaded, sandbox) as (backend, counts):
        timing = calibrate_wallclock.time_host(loaded, backend, sessions, counts)
    check_values(loaded.model_copy(update={"host": timing}))  # else no episode could use it
    path = host_timing_path(loaded.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_calibration(path, timing)
    errors.print(f"wrote {path}")
    if as_json:
        print_json(timing.model_dump())
        return 0
    for name, ratio in timing.log_ratios.items():
        say(f"{name}: {math.exp(ratio):.3f} of the start's time (± {timing.log_ratio_errors[name]:.1%})")
    say(f"sd of a pair: {timing.pair_sd:.2%} ({timing.pairs} pairs)")
    return 0


@contextmanager
def _calibration_backend(tier: Tier, sandbox: str) -> Iterator[tuple[Queued, Callable[[str, int, int], None]]]:
    backend = Queued(LocalBackend(sandbox, warm=True, hidden=(tier.folder, tier.corpus_folder())), "calibration")
    try:
        with display.watch_counts() as counts:
            yield backend, counts
    except KeyboardInterrupt:
        errors.print("finished runs are kept: the same command continues")
        raise
    finally:
        backend.close()

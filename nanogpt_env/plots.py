"""Pictures of episodes, comparisons and records. Needs matplotlib (`pip install 'nanogpt_env[plot]'`)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanogpt_env.compare import CONFIDENCE, Entry, at
from nanogpt_env.human import PublicTable
from nanogpt_env.stats import mean_interval
from nanogpt_env.tracks import StepsTier, Tier

SMOOTHING = 10  # steps averaged in the training curves


def episode(path: Path, tier: Tier, runs: list[dict[str, Any]], verdicts: list[dict[str, Any]]) -> None:
    """What happened in an episode: losses of the runs over steps or seconds, the target, and the verdicts.

    Raises ImportError without matplotlib, OSError if `path` cannot be written.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    target = tier.table.training.target
    axes.axhline(target, color="black", linestyle="--", linewidth=1, label=f"target {target:g}")
    if isinstance(tier, StepsTier):
        ends = _loss_curves(axes, tier, runs, verdicts)
    else:
        ends = _losses_over_time(axes, tier, runs, verdicts)
    ends = [loss for loss in ends if math.isfinite(loss)]
    if ends:
        axes.set_ylim(min([*ends, target]) - 0.05, max([*ends, target]) + 0.3)
    axes.set_ylabel("loss, nats per token")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def records(path: Path, table: PublicTable, human_only: bool = False) -> None:
    """The best public record over time, on a logarithmic scale if it fell to less than half; records that credit an AI
    system and those that came by a newer torch only are marked. Raises as `episode`."""
    import matplotlib.figure

    rows = sorted((r for r in table.curve(human_only) if r.date), key=lambda r: (r.date, -r.value))
    days: dict[int, Any] = {r.number: r.date for r in rows}
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    best = list(itertools.accumulate((r.value for r in rows), min))  # dates are of submission, not of acceptance
    axes.step(list(days.values()), best, where="post", color="C0", linewidth=1)
    kinds = {
        "people": ("o", "C0", [r for r in rows if not r.ai_system and not r.framework_upgrade_only]),
        "credits an AI system": ("D", "C3", [r for r in rows if r.ai_system]),
        "newer torch only": ("s", "grey", [r for r in rows if r.framework_upgrade_only]),
    }
    for label, (marker, colour, found) in kinds.items():
        if found:
            axes.plot(
                [days[r.number] for r in found], [r.value for r in found], marker, color=colour, ms=4, label=label
            )
    if rows[0].value > 2 * rows[-1].value:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    unit = table.metric.removeprefix("wallclock_")
    axes.set_ylabel(unit if table.metric == "steps" else f"{unit} on 8 H100")
    axes.set_title(f"Public records, {table.track} track, to a validation loss of {table.target_val_loss:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.autofmt_xdate()
    figure.savefig(path, dpi=120)


def comparison(path: Path, entries: Sequence[Entry]) -> None:
    """Mean recovered over device-seconds (runs and verification), by agent, with the confidence band of the mean.
    Raises as `episode`."""
    import matplotlib.figure
    import numpy as np

    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    seconds = np.linspace(0, max(sum(e.device_seconds.values()) for e in entries), 200)
    for i, name in enumerate(dict.fromkeys(e.agent for e in entries)):
        own = [e for e in entries if e.agent == name]
        curves = np.array([[at(e, s) for s in seconds] for e in own])
        axes.plot(seconds, curves.mean(axis=0), color=f"C{i}", label=f"{name} (n = {len(own)})")
        if len(own) > 1:
            bands = np.array([mean_interval(column, CONFIDENCE) for column in curves.T])
            axes.fill_between(seconds, bands[:, 0], bands[:, 1], color=f"C{i}", alpha=0.15, linewidth=0)
    axes.set_xlabel("device-seconds of runs and verification")
    axes.set_ylabel("recovered share of the human speedup")
    axes.set_title(f"{entries[0].tier}: mean over episodes, with its {CONFIDENCE:.0%} interval")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _loss_curves(axes: Any, tier: Tier, runs: list[dict[str, Any]], verdicts: list[dict[str, Any]]) -> list[float]:
    """Training loss (smoothed) and validation points of every run, and the verdicts' claims; returns the losses that
    are to be seen: the interesting part is the end of the runs."""
    import numpy as np

    ends = []
    for i, run in enumerate(runs):
        losses = np.array(run["train_losses"])
        if len(losses) >= SMOOTHING:
            smooth = np.convolve(losses, np.ones(SMOOTHING) / SMOOTHING, mode="valid")
            axes.plot(np.arange(SMOOTHING, len(losses) + 1), smooth, color=f"C{i}", alpha=0.35, linewidth=1)
        if points := whole_shard(run, tier.table.data.public):
            label = f"{run['handle']}, horizon {run['horizon']}"
            axes.plot(*zip(*points, strict=True), "o-", color=f"C{i}", markersize=3, label=label)
            ends += [loss for _, loss in points]
    for verdict in verdicts:
        at = (verdict["claim"], tier.table.training.target)
        _mark(axes, at, verdict["accepted"], f"claim {verdict['claim']}", str(verdict["claim"]))
    axes.set_xlabel("steps")
    axes.set_title(f"{tier.name}: one episode (validation; pale: training)")
    return ends


def _losses_over_time(axes: Any, tier: Tier, runs: list[dict[str, Any]], verdicts: list[dict[str, Any]]) -> list[float]:
    """Final validation loss of every run over its training seconds, and of the verdicts that got as far as a time."""
    ends = []
    for i, run in enumerate(runs):
        if (loss := run["val_losses"].get(tier.table.data.public)) is not None:
            axes.plot(run["train_seconds"], loss, "o", color=f"C{i}", markersize=6, label=run["handle"])
            ends.append(loss)
    for verdict in verdicts:
        if verdict["time"] and verdict["coarse_loss"] is not None:
            at = (verdict["time"]["seconds"], verdict["coarse_loss"])
            _mark(axes, at, verdict["accepted"], verdict["submission"], verdict["submission"])
            ends.append(verdict["coarse_loss"])
    axes.set_xlim(left=0)
    axes.set_xlabel("training seconds")
    axes.set_title(f"{tier.name}: one episode (runs: public shard; submissions: hidden shard)")
    return ends


def _mark(axes: Any, at: tuple[float, float], accepted: bool, name: str, note: str) -> None:
    mark, label, colour = ("^", "accepted", "green") if accepted else ("x", "rejected", "red")
    axes.plot(*at, mark, color=colour, label=f"{name}, {label}")
    axes.annotate(note, at, (0, -14), textcoords="offset points", ha="center", fontsize=8)


def whole_shard(run: dict[str, Any], shard: str) -> list[tuple[int, float]]:
    """A run's evaluated steps with their loss on the whole public shard: the points saw a small part of it, and are
    shifted by what part and whole differ by at the end."""
    points = run["val_points"]
    shift = run["val_losses"][shard] - points[-1][1] if points and shard in run["val_losses"] else 0.0
    return [(step, loss + shift) for step, loss in points]

"""Pictures of an episode. Needs matplotlib (`pip install 'nanogpt_env[plot]'`)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from nanogpt_env.tracks import Tier

SMOOTHING = 10  # steps averaged in the training curves


def loss_curves(path: Path, tier: Tier, runs: list[dict[str, Any]], verdicts: list[dict[str, Any]]) -> None:
    """Training loss (smoothed) and validation points of every run, the target, and the verdicts' claims.

    Raises ImportError without matplotlib, OSError if `path` cannot be written.
    """
    import matplotlib.figure
    import numpy as np

    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for i, run in enumerate(runs):
        colour = f"C{i}"
        losses = np.array(run["train_losses"])
        if len(losses) >= SMOOTHING:
            smooth = np.convolve(losses, np.ones(SMOOTHING) / SMOOTHING, mode="valid")
            axes.plot(np.arange(SMOOTHING, len(losses) + 1), smooth, color=colour, alpha=0.35, linewidth=1)
        if points := whole_shard(run, tier.table.data.public):
            steps, values = zip(*points, strict=True)
            axes.plot(
                steps, values, "o-", color=colour, markersize=3, label=f"{run['handle']}, horizon {run['horizon']}"
            )
    target = tier.table.training.target
    axes.axhline(target, color="black", linestyle="--", linewidth=1, label=f"target {target:g}")
    for verdict in verdicts:
        mark, label = ("^", "accepted") if verdict["accepted"] else ("x", "rejected")
        colour = "green" if verdict["accepted"] else "red"
        axes.plot(verdict["claim"], target, mark, color=colour, label=f"claim {verdict['claim']}, {label}")
        at = (verdict["claim"], target)
        axes.annotate(str(verdict["claim"]), at, (0, -14), textcoords="offset points", ha="center", fontsize=8)
    # the interesting part is the end of the runs
    ends = [loss for run in runs for _, loss in whole_shard(run, tier.table.data.public) if math.isfinite(loss)]
    if ends:
        axes.set_ylim(min([*ends, target]) - 0.05, max(ends) + 0.3)
    axes.set_xlabel("steps")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(f"{tier.name}: one episode (validation; pale: training)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def whole_shard(run: dict[str, Any], shard: str) -> list[tuple[int, float]]:
    """A run's evaluated steps with their loss on the whole public shard: the points saw a small part of it, and are
    shifted by what part and whole differ by at the end."""
    points = run["val_points"]
    shift = run["val_losses"][shard] - points[-1][1] if points and shard in run["val_losses"] else 0.0
    return [(step, loss + shift) for step, loss in points]

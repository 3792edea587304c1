"""The Gymnasium spaces of the environment."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from nanogpt_env.actions import ACTION_NAMES, MAX_SEED

MAX_TEXT = 1 << 20
MAX_STEPS = 10**6

SCORES = ("recovered", "best_share", "val_loss", "train_loss", "last_accepted", "submissions")
"""Entries of `observation["scores"]`: share recovered by the best verified submission; its value (steps, or time)
over the start record's; the last completed run's losses (0 before one, and where none are measured); 1 if the last
verdict was an acceptance; verdicts so far."""
SCORE_LIMITS = {"recovered": (-100.0, 100.0)}


class FreeText(spaces.Text):
    """Any text up to `max_length` characters. Stock `Text` checks character by character (23 ms for
    100 kB) and refuses all outside its charset; vector environments need `shared_memory=False`."""

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """Short: stock `Text` draws lengths up to the maximum, 0.1 s a sample at a million."""
        length = int(self.np_random.integers(1, min(self.max_length, 64) + 1))
        return super().sample(mask or (length, None), probability)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length


def action_space() -> spaces.Dict:
    """The flat form of an action: unused texts are "", unused numbers 0, unused `wait` 1. A random sample
    always has a text too many, is refused as malformed and so never starts a run."""
    text = {name: FreeText(MAX_TEXT) for name in ("path", "text", "old", "handle")}
    integers = {name: spaces.Discrete(MAX_STEPS + 1) for name in ("steps", "horizon", "claim")}
    return spaces.Dict(
        {
            "type": spaces.Discrete(len(ACTION_NAMES)),
            **text,
            **integers,
            "seed": spaces.Discrete(MAX_SEED + 1),
            "wait": spaces.Discrete(2),
        }
    )


def observation_space(meters: tuple[str, ...]) -> spaces.Dict:
    """`text`: for people and language models; `scores`: see SCORES; `budget`: what is left of each meter,
    as a share, in the order of `budget.METERS`."""
    low, high = (np.array([SCORE_LIMITS.get(name, (0.0, 1e6))[i] for name in SCORES], dtype=np.float32) for i in (0, 1))
    return spaces.Dict(
        {
            "text": FreeText(MAX_TEXT),
            "scores": spaces.Box(low, high, dtype=np.float32),
            "budget": spaces.Box(0.0, 1.0, (len(meters),), dtype=np.float32),
        }
    )


def box(values: list[float], space: spaces.Space[Any]) -> NDArray[np.float32]:
    """`values` as a fresh float32 array inside the bounds of `space`."""
    assert isinstance(space, spaces.Box)
    clipped: NDArray[np.float32] = np.clip(np.array(values, dtype=np.float32), space.low, space.high)
    return clipped

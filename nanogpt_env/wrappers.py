"""The environment for standard libraries of reinforcement learning: numbers in and out, or text in and out."""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray

from nanogpt_env import literals, scoring
from nanogpt_env.actions import Action, Run, Stop, Submit, WriteFile, describe_actions
from nanogpt_env.agents.search import SCALE, needed
from nanogpt_env.env import Info, Observation, Speedrun
from nanogpt_env.errors import ActionError, BackendError
from nanogpt_env.spaces import MAX_TEXT, FreeText, box
from nanogpt_env.tracks import StepsTier, Tier

Numbers = NDArray[np.float32]

CLAIM_FACTOR = 2.0
"""what a 1 in the place of the steps claimed multiplies the start record's by, and a -1 divides"""
FURTHEST = 3.0
"""bound of what an observation says about a loss, and of what a run promises"""


class Settings:
    """The numbers of a program as a vector in -1 to 1: its settings (`literals`) in the order of the text, all 0 as
    they stand there; on steps tracks then the steps claimed, 0 for the start record's.

    source: text of the tier's first file, by default the start record's. Raises `ActionError` if it has no numbers.
    """

    def __init__(self, tier: Tier, source: str | None = None) -> None:
        self.tier, self.file, self.span = tier, tier.files[0], tier.span()
        self.source = tier.record(self.span.program).sources[self.file] if source is None else source
        self.names = tuple(literal.name for literal in literals.find(self.source))
        if not self.names:
            raise ActionError(f"{self.file} has no numbers to move")
        self.size = len(self.names) + isinstance(tier, StepsTier)

    def program(self, action: Numbers) -> tuple[str, int | None]:
        """The source, and the steps claimed, that an action means. Raises `ValueError` for one out of the space."""
        moves = np.asarray(action, dtype=np.float64)
        if moves.shape != (self.size,) or not np.isfinite(moves).all():
            raise ValueError(f"an action is {self.size} finite numbers, not {action!r}")
        source = literals.moved(self.source, moves[: len(self.names)].tolist())
        if not isinstance(self.tier, StepsTier):
            return source, None
        claim = self.span.start_value * CLAIM_FACTOR ** float(np.clip(moves[-1], -1, 1))
        return source, max(2, min(round(claim), self.tier.table.training.max_horizon))

    def attempt(self, action: Numbers, gain: float = 1.0) -> Generator[Action, tuple[Observation, Info], None]:
        """Actions that write the program, train it once and, if that reached the target in fewer steps than this share
        of the best so far, submit it. To be sent what each came to."""
        source, claim = self.program(action)
        yield WriteFile(path=self.file, text=source)
        _, info = yield Run(horizon=claim)
        above = self.above(info)
        if above is not None and above <= 0 and not (claim and claim >= gain * info["best"]):
            yield Submit(claim=claim, horizon=claim)

    def above(self, info: Info) -> float | None:
        """Nats by which the run that was just made ended above the target; None if it did not complete."""
        losses = info.get("run", {}).get("val_losses")
        return losses[self.tier.table.data.public] - self.tier.table.training.target if losses else None

    def promise(self, info: Info) -> float:
        """Share of the human speedup, on a log scale, that an attempt promises on a steps track, unverified. A claim
        below what the program seems to need promises as little as one that is as far above."""
        above = self.above(info)
        if above is None:
            return -FURTHEST
        claim = info["run"]["horizon"]
        need = needed(claim, above)
        share = scoring.recovered_log(self.span.start_value, self.span.anchor_value, max(claim, need * need / claim))
        return float(np.clip(share, -FURTHEST, FURTHEST))


class SettingsWrapper(gymnasium.Wrapper[Any, Any, Observation, Any], RecordConstructorArgs):
    """One step is one attempt: the action's numbers are written into the program (`Settings`), which is trained once
    and, if that reached the target in fewer steps than the best so far, submitted. The reward is the environment's,
    plus `promise` times what the run promises, which is not verified; `info["verified"]` is without it.

    Observation: share of the attempts that are left; share recovered; 1 if the last attempt was accepted; how far its
    loss was above the target, in units of 0.4 nat (a factor of e in steps); its numbers. Zeros before there is one.
    An episode ends after so many `attempts`. Raises `ValueError` for numbers out of the space, `BackendError` when our
    side fails, `ActionError` for `promise` on other tracks than steps.
    """

    def __init__(
        self, env: gymnasium.Env[Observation, Any], source: str | None = None, attempts: int = 1, promise: float = 0.0
    ) -> None:
        RecordConstructorArgs.__init__(self, source=source, attempts=attempts, promise=promise)
        super().__init__(env)
        assert isinstance(env.unwrapped, Speedrun)
        self.settings = Settings(env.unwrapped.tier, source)
        if promise and not isinstance(self.settings.tier, StepsTier):
            raise ActionError("what a run promises is known on steps tracks only")
        self.attempts, self.promise = attempts, promise
        self.action_space = spaces.Box(-1.0, 1.0, (self.settings.size,), np.float32)
        low = np.array([0, -FURTHEST, 0, -FURTHEST, *self.action_space.low], np.float32)
        self.observation_space = spaces.Box(
            low, np.array([1, FURTHEST, 1, FURTHEST, *self.action_space.high], np.float32)
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Numbers, Info]:
        _, info = self.env.reset(seed=seed, options=options)
        self._made = 0
        return self._observation(info, np.zeros(self.settings.size, np.float32)), info

    def step(self, action: Numbers) -> tuple[Numbers, float, bool, bool, Info]:
        attempt = self.settings.attempt(action)
        outcome: Any = None
        info: Info = {}
        verified, truncated = 0.0, False
        while not truncated:
            try:
                step = attempt.send(outcome)
            except StopIteration:
                break
            observation, reward, _, truncated, latest = self.env.step(step)
            if latest.get("error") == "BackendError":
                raise BackendError(observation["text"])
            truncated = truncated or latest.get("error") == "BudgetError"
            verified += float(reward)
            outcome = observation, latest
            info |= latest  # its run, its verdict and how it stands
        self._made += 1
        terminated = self._made >= self.attempts and not truncated
        if terminated:
            self.env.step(Stop())
        info["verified"] = verified
        promised = self.promise * self.settings.promise(info) if self.promise else 0.0
        return self._observation(info, action), verified + promised, terminated, truncated, info

    def _observation(self, info: Info, action: Numbers) -> Numbers:
        above = self.settings.above(info) if "run" in info else 0.0
        left, accepted = 1 - self._made / self.attempts, bool(info.get("verdict", {}).get("accepted"))
        values = [left, info["recovered"], accepted, FURTHEST if above is None else above / SCALE, *action]
        return box([float(v) for v in values], self.observation_space)


class TextWrapper(gymnasium.Wrapper[Any, Any, Observation, Any], RecordConstructorArgs):
    """Text in, text out, for language models. A reply is free text with one action as a JSON object in it, in a fenced
    block if there is more than one brace; the answer is the environment's text, with what is left of the budget."""

    def __init__(self, env: gymnasium.Env[Observation, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self.action_space = self.observation_space = FreeText(MAX_TEXT)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        observation, info = self.env.reset(seed=seed, options=options)
        return f"{observation['text']}\n\n{HOW_TO}\n{describe_actions()}", info

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        observation, reward, terminated, truncated, info = self.env.step(find_action(action))
        left = ", ".join(f"{meter} {status['left']:.4g}" for meter, status in info["budget"].items())
        return f"{observation['text']}\nleft: {left}", float(reward), terminated, truncated, info


HOW_TO = """Each reply ends with one action: a JSON object in a block between ```json and ```, such as
```json
{"type": "read_file", "path": "task.md"}
```
Actions:"""

_BLOCK = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)


def find_action(reply: str) -> str:
    """The JSON text of a reply: its last fenced block, else from its first brace to its last, else all of it."""
    if blocks := _BLOCK.findall(reply):
        return str(blocks[-1])
    first, last = reply.find("{"), reply.rfind("}")
    return reply[first : last + 1] if 0 <= first < last else reply

"""The speedrun as a `gymnasium.Env`: orchestration only. docs/environment.md is the reference."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from nanogpt_env import actions as act
from nanogpt_env import report
from nanogpt_env.backends import Backend
from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.backends.queued import Queued
from nanogpt_env.backends.shared import Shared
from nanogpt_env.budget import METERS, Budget
from nanogpt_env.content import state_dir
from nanogpt_env.episode import AgentRun, Episode
from nanogpt_env.errors import ActionError, BackendError, BudgetError, LedgerError
from nanogpt_env.hardware import mfu
from nanogpt_env.judging.panel import Panel
from nanogpt_env.ledger import write_whole
from nanogpt_env.resume import resume
from nanogpt_env.spaces import MAX_TEXT, action_space, box, observation_space
from nanogpt_env.tables import JudgeSeat
from nanogpt_env.tiers import load_tier
from nanogpt_env.tracks import StepsTier, Tier
from nanogpt_env.types import Plan, Rerun
from nanogpt_env.verify import OnProgress
from nanogpt_env.workspace import Workspace

Observation = dict[str, Any]
Info = dict[str, Any]
StepResult = tuple[Observation, float, bool, bool, Info]


CHECKPOINT = "checkpoint.json"
GPU_HOUR_S = 3600.0


@dataclass
class Outcome:
    """What one action did."""

    text: str
    reward: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    """further keys of info"""


class Speedrun(gymnasium.Env[Observation, Any]):
    """One agent, one tier. `step` takes an action of `nanogpt_env.actions`, the equivalent dict, or JSON text.

    tier: name of a tier or path of its folder. start, anchor: names of its records or, on tiers that are measured on
    public records, selectors of those (`human.PublicTable.select`), with human_only. budget: meters to override.
    sandbox: 'auto', 'bubblewrap' or 'plain'. state_dir: where ledger and evidence go. backend: what trains (default:
    this machine). agent_trusted: False if what chooses the actions could run code as this user, as an agent with a
    shell could: its verdicts say `trusted: false`. judges: instead of the tier's (docs/judges.md). Raises `TierError`
    for a tier that cannot be used, `ActionError` or `JudgeUnavailable` for a judge.
    """

    # annotated as Gymnasium does, hence the noqa
    metadata: dict[str, Any] = {"render_modes": ["ansi", "human"], "render_fps": 1}  # noqa: RUF012

    def __init__(
        self,
        tier: str | Path = "nano-steps",
        *,
        start: str | None = None,
        anchor: str | None = None,
        human_only: bool | None = None,
        budget: Mapping[str, float] | None = None,
        sandbox: str = "auto",
        state_dir: str | Path | None = None,
        backend: Backend | None = None,
        agent_trusted: bool = True,
        judges: Sequence[JudgeSeat] | None = None,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be one of {self.metadata['render_modes']}, not {render_mode!r}")
        self.tier: Tier = load_tier(tier)
        self.render_mode = render_mode
        self.action_space = action_space()
        self.observation_space = observation_space(METERS)
        self._defaults: dict[str, Any] = {"start": start, "anchor": anchor, "human_only": human_only, "budget": budget}
        self._state_dir, self.agent_trusted = state_dir, agent_trusted
        self.panel = Panel(self.tier.table.judges if judges is None else judges, self.tier.folder)
        if backend is None:
            local = LocalBackend(sandbox, warm=True, hidden=(self.tier.folder, self.tier.corpus_folder()))
            backend = Shared(Queued(local, owner=uuid.uuid4().hex[:8]), local.kind)
        self._backend: Backend = backend
        # a fork shares both and closes neither; after a reset it has an episode of its own
        self._owns_backend = self._owns_episode = True
        self._episode: Episode | None = None
        self.history: list[tuple[str, str]] = []
        # observers for progress displays; they must not raise
        self.on_rerun: Callable[[Rerun], None] = lambda rerun: None
        self.on_progress: OnProgress = lambda what, handle: None

    @property
    def episode(self) -> Episode:
        if self._episode is None:
            raise gymnasium.error.ResetNeeded("call reset() first")
        return self._episode

    def _going(self) -> Episode:
        """The episode, unless it is over."""
        if self.episode.over:
            raise gymnasium.error.ResetNeeded(f"the episode is over ({self.episode.over}); call reset()")
        return self.episode

    # --- Gymnasium ---

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, Info]:
        """Begin an episode. options: `start`, `anchor`, `human_only`, `budget`, as for the class.

        The seed never determines verification seeds. Raises `ActionError` for options that make no sense,
        `TierError` for a record that the tier does not have or has not valued.
        """
        super().reset(seed=seed)
        chosen = self._options(options or {})
        limits = self._limits(chosen["budget"] or {})
        span = self.tier.span(chosen["start"], chosen["anchor"], chosen["human_only"])
        if self._episode is not None and self._owns_episode:
            self._episode.end("reset")
        folder = Path(self._state_dir or state_dir())
        self._episode = Episode.begin(
            self.tier, span, Budget(limits), self._backend, folder, self.agent_trusted, self.panel
        )
        self._owns_episode = True
        self._new_workspace(self._episode)
        self.history = []
        self._keep()
        text = self._opening()
        self._render_human(text)
        return self._observation(text), self._info()

    def resume(self, folder: str | Path) -> tuple[Observation, Info]:
        """Go on with the episode of this folder, whose process has died: (observation, info) as `reset`. What it had
        reserved counts as spent. Raises `LedgerError` if that episode is in use, has ended, or is of another tier."""
        folder = Path(folder)
        try:
            kept = json.loads((folder / CHECKPOINT).read_text(encoding="utf-8"))
            snapshots = dict(kept["snapshots"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LedgerError(f"{folder} has no checkpoint to go on from: {error!r}") from None
        episode = resume(folder, self.tier, self._backend, snapshots, self.agent_trusted, self.panel)
        if self._episode is not None and self._owns_episode:
            self._episode.end("resumed another")
        self._episode, self._owns_episode = episode, True
        self._new_workspace(episode)
        try:
            self.restore(kept)
        except ActionError as error:
            episode.ledger.close()
            self._episode = None
            raise LedgerError(f"the checkpoint in {folder} cannot be used: {error}") from None
        return self._observation(self._opening()), self._info()

    def rules(self) -> str:
        """What the tier's judges hold a program to; "" if there are none with a book."""
        return self.panel.rules(self.episode.material(self.episode.start_program.sources))

    def _opening(self) -> str:
        parts = (self.tier.task, self.rules(), report.state_text(self.episode))
        return "\n".join(part for part in parts if part)

    def _new_workspace(self, episode: Episode) -> None:
        sources = self.tier.record(episode.span.program).sources
        self.workspace = Workspace(sources, {"task.md": self.tier.task}, self.tier.table.limits.source_bytes)

    def _keep(self) -> None:
        """The checkpoint that `resume` begins with. Written beside the ledger, as a whole or not at all."""
        if self._owns_episode:
            write_whole(self.episode.folder / CHECKPOINT, json.dumps(self.checkpoint()))

    def step(self, action: Any) -> StepResult:
        """Do one action. Nothing the agent sends raises: a malformed or impossible action is an
        observation that says why, with `info["error"]` set. Raises only for failures of ours."""
        with self.episode.step():
            return self._step(self._going(), action)

    def _step(self, episode: Episode, action: Any) -> StepResult:
        episode.collect()
        outcome, name = self._perform(action)
        episode.budget.charge("episode_steps")
        exhausted = episode.budget.exhausted()
        terminated = name == "stop" and "error" not in outcome.extra
        truncated = bool(exhausted) and not terminated
        info_error = outcome.extra.get("error", "")
        episode.ledger.append("action", type=name, error=info_error, snapshot=self.workspace.snapshot)
        self.history.append((name, outcome.text))
        self._keep()
        if terminated or truncated:
            episode.end("stopped by the agent" if terminated else f"budget spent: {exhausted}")
        text = outcome.text
        if truncated:
            text += f"\nThe episode is over: {exhausted} is spent."
        self._render_human(text)
        return self._observation(text), outcome.reward, terminated, truncated, self._info(outcome.extra)

    def render(self) -> str | None:
        if self.render_mode == "ansi":
            return report.state_text(self.episode)
        return None

    def leave(self) -> None:
        """Give the episode up where it is, with nothing left running, so that `resume` can go on with it."""
        self._going().leave()

    def close(self) -> None:
        """End the episode and everything it started. Safe to call twice."""
        try:
            if self._owns_episode and self._episode is not None:
                self._episode.end("closed")
        finally:
            if self._owns_backend:
                self.panel.close()
                self._backend.close()

    # --- checkpoints and forks ---

    def checkpoint(self) -> dict[str, Any]:
        """Workspace and history as JSON-ready data. Meters, runs and verdicts are not part of it: they
        belong to the episode and only grow."""
        history = [list(entry) for entry in self.history]
        return {"episode": self.episode.id, **self.workspace.state(), "history": history}

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Bring workspace and history back to a checkpoint of this episode. Raises `ActionError` otherwise."""
        try:
            of, history = checkpoint["episode"], [(name, text) for name, text in checkpoint["history"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ActionError(f"not a checkpoint: {error!r}") from None
        if of != self._going().id:
            raise ActionError(f"the checkpoint is of episode {of}, this is {self.episode.id}")
        if not all(isinstance(part, str) for entry in history for part in entry):
            raise ActionError("not a checkpoint: its history is not of texts")
        self.workspace.load(checkpoint)
        self.history = history
        self.episode.ledger.append("restore", snapshot=self.workspace.snapshot)

    def fork(self) -> Speedrun:
        """Another environment on the same episode: its own workspace and history, shared meters,
        submissions, verdicts and best score. Closing a fork leaves the episode alone."""
        twin = Speedrun(self.tier.folder, backend=self._backend, judges=(), render_mode=self.render_mode)
        twin.panel, twin.agent_trusted = self.panel, self.agent_trusted
        twin._owns_backend = twin._owns_episode = False
        twin._episode, twin._defaults, twin._state_dir = self._going(), self._defaults, self._state_dir
        sources = self.tier.record(self.episode.span.program).sources
        twin.workspace = Workspace(sources, self.workspace.frozen, self.workspace.max_bytes)
        self.episode.ledger.append("fork", snapshot=self.workspace.snapshot)
        twin.restore(self.checkpoint())
        return twin

    # --- actions ---

    def _perform(self, raw: Any) -> tuple[Outcome, str]:
        name = "malformed"
        try:
            action = act.parse_action(raw)
            name = action.type
            return self._dispatch(action), name
        except (ActionError, BudgetError) as error:
            return Outcome(f"refused: {error}", extra={"error": type(error).__name__}), name
        except BackendError as error:
            text = f"our side failed, nothing was charged: {error}"
            return Outcome(text, extra={"error": "BackendError"}), name

    def _dispatch(self, action: act.Action) -> Outcome:
        w = self.workspace
        match action:
            case act.ReadFile(path=path):
                return Outcome(w.read(path))
            case act.WriteFile(path=path, text=text):
                w.write(path, text)
                return Outcome(f"wrote {path}, snapshot {w.snapshot[:12]}")
            case act.EditFile(path=path, old=old, new=new):
                w.edit(path, old, new)
                return Outcome(f"edited {path}, snapshot {w.snapshot[:12]}")
            case act.ApplyPatch(patch=patch):
                changed = w.patch(patch)
                return Outcome(f"patched {', '.join(changed)}, snapshot {w.snapshot[:12]}")
            case act.Revert(snapshot=snapshot):
                return Outcome(f"back at snapshot {w.revert(snapshot)[:12]}")
            case act.Note(text=text):
                w.note(text)
                return Outcome("noted")
            case act.Run():
                return self._run(action)
            case act.Poll(handle=handle):
                return self._run_outcome(self._find(handle))
            case act.Cancel(handle=handle):
                run = self._find(handle)
                self.episode.cancel(run)
                return self._run_outcome(run)
            case act.Submit():
                return self._submit(action)
            case act.Stop():
                return Outcome(report.state_text(self.episode))

    def _run(self, action: act.Run) -> Outcome:
        plan = self.tier.plan(action.horizon, action.steps)
        snapshot = self.workspace.keep()
        run = self.episode.start_run(self.workspace.files, snapshot, plan, action.seed)
        if action.wait:
            self.episode.wait(run, self.on_progress)
        return self._run_outcome(run)

    def _run_outcome(self, run: AgentRun) -> Outcome:
        text = report.run_text(run, self.tier.table.data.public)
        error = {"error": "BackendError"} if run.error else {}
        return Outcome(text, extra={"run": self._run_info(run), **error})

    def _run_info(self, run: AgentRun) -> dict[str, Any]:
        info: dict[str, Any] = {"handle": run.handle, "done": run.result is not None or bool(run.error)}
        info |= {"horizon": run.plan.horizon if run.plan else None, "seed": run.seed}
        if run.result:
            info |= {**run.result.model_dump(), "mfu": mfu(run.result)}
        return info

    def _find(self, handle: str) -> AgentRun:
        if handle not in self.episode.runs:
            raise ActionError(f"no run {handle!r}; there are {', '.join(self.episode.runs) or 'none yet'}")
        return self.episode.runs[handle]

    def _submit(self, action: act.Submit) -> Outcome:
        sources, episode = dict(self.workspace.files), self.episode
        episode.judge(sources)
        plan, advice = self._claim(action)
        snapshot = self.workspace.keep()
        verdict, reward = episode.submit(sources, snapshot, plan, self.on_rerun, self.on_progress)
        text = advice + report.verdict_text(verdict, reward, episode)
        return Outcome(text, reward, extra={"verdict": verdict.model_dump()})

    def _claim(self, action: act.Submit) -> tuple[Plan | None, str]:
        """What is claimed, and why if the agent left it out."""
        if not isinstance(self.tier, StepsTier):
            return self.tier.plan(action.horizon, action.claim), ""
        sources = self.workspace.files
        horizon = action.horizon or self.episode.last_horizon(sources) or action.claim
        if horizon is None:
            raise ActionError("give a claim or a horizon, or complete a run of this program first")
        if action.claim is not None:
            return self.tier.plan(horizon, action.claim), ""
        chosen = self.episode.advice(sources, horizon)
        if chosen.claim is None:
            raise ActionError(f"no claim was given and none can be made: {chosen.text}")
        return self.tier.plan(horizon, chosen.claim), chosen.text + "\n"

    # --- observations ---

    def _observation(self, text: str) -> Observation:
        e = self.episode
        completed = [r.result for r in e.runs.values() if r.result and r.result.completed]
        val_loss, train_loss = report.last_losses(completed, self.tier.table.data.public)
        scores = [
            e.recovered,
            e.best / e.span.start_value,
            val_loss,
            train_loss,
            float(bool(e.verdicts) and e.verdicts[-1].accepted),
            float(len(e.verdicts)),
        ]
        left = [e.budget.left(m) / e.budget.limits[m] for m in METERS]
        spaces = self.observation_space
        assert isinstance(spaces, gymnasium.spaces.Dict)
        return {
            "text": text[:MAX_TEXT],
            "scores": box(scores, spaces["scores"]),
            "budget": box(left, spaces["budget"]),
        }

    def _info(self, extra: Mapping[str, Any] | None = None) -> Info:
        e = self.episode
        return {
            "episode_id": e.id,
            "ledger": str(e.ledger.path),
            "snapshot": self.workspace.snapshot,
            "best": e.best,
            "recovered": e.recovered,
            "budget": e.budget.status(),
            "verification_device_seconds": e.budget.verification_device_seconds,
            "running": [r.handle for r in e.active],
            **(extra or {}),
        }

    def _render_human(self, text: str) -> None:
        if self.render_mode == "human":
            print(f"{text}\n{report.state_text(self.episode)}\n")

    # --- options ---

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        unknown = set(options) - set(self._defaults)
        if unknown:
            raise ActionError(f"unknown options {', '.join(sorted(unknown))}; there are {', '.join(self._defaults)}")
        return {**self._defaults, **options}

    def _limits(self, override: Mapping[str, float]) -> dict[str, float]:
        """The tier's allowances with overrides; `gpu_hours` stands for device_seconds. More submissions than the
        tier's would spend more than its alpha, so that meter can only be lowered."""
        limits: dict[str, float] = self.tier.table.budget.model_dump()
        unknown = set(override) - set(limits) - {"gpu_hours"}
        if unknown:
            raise ActionError(f"unknown meters {', '.join(sorted(unknown))}; there are {', '.join(limits)}, gpu_hours")
        for meter, value in override.items():
            if not isinstance(value, (int, float, np.integer)) or not (np.isfinite(value) and value > 0):
                raise ActionError(f"budget {meter} must be positive and finite, got {value}")
        if override.get("submissions", 0) > limits["submissions"]:
            raise ActionError(
                f"submissions can be lowered but not raised above the tier's {limits['submissions']}: "
                "its error level is spent over them"
            )
        if {"gpu_hours", "device_seconds"} <= set(override):
            raise ActionError("gpu_hours and device_seconds are one meter: give one of them")
        limits |= {m: float(v) for m, v in override.items()}
        if hours := limits.pop("gpu_hours", 0.0):
            limits["device_seconds"] = GPU_HOUR_S * hours
        return limits

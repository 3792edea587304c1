"""Trains a language model to play the speedrun, by GRPO: its tools are the environment's actions, its reward is what
verification accepts.

    pip install 'nanogpt_env[rl,train]'
    python examples/train_grpo.py --model Qwen/Qwen3-1.7B --tier nano-steps --steps 50 --output grpo

Each step plays one group of rollouts, an episode each, and moves the model towards those that recovered more than the
group's mean. `grpo/` takes the model and its checkpoints, `curve.jsonl` with a line a step, and `episodes/` with every
ledger. `--resume` goes on from the last checkpoint. TRL calls tools one after the other, so a step takes as long as all
runs and reruns of its group together, on nano-steps some ten seconds each; identical runs are trained once. This is
for tiers that train on CPU cores: one for GPUs would find the language model's in use, and no rollout had a reward.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from nanogpt_env.env import Speedrun
from nanogpt_env.tiers import load_tier

HOW_TO = "Of these actions you have those that are tools of yours. When you are done, answer without calling a tool."
OVER = "The episode is over; nothing more can be done in it."


class SpeedrunTools:
    """One environment; each rollout is an episode of it. To TRL every public method is a tool, but `reset` and
    `get_reward`."""

    def __init__(self, env: Speedrun, characters: int) -> None:
        self.env, self.characters = env, characters
        self.reward, self.failed, self.over = 0.0, False, True

    def reset(self, **example: object) -> str:
        """Begin an episode: what the model is told."""
        observation, _ = self.env.reset()
        self.reward, self.failed, self.over = 0.0, False, False
        # GRPO compares answers to one prompt, in which no clock may differ
        text = re.sub(r"(wall_seconds:) \S+", r"\1 0", observation["text"])
        return f"{text}\n\n{HOW_TO}"

    def get_reward(self) -> float | None:
        """What was recovered, as verified. None if our side failed: TRL leaves such a rollout out of the group's mean
        and learns nothing from it."""
        return None if self.failed else self.reward

    def read_file(self, path: str = "") -> str:
        """Show a file of the workspace.

        Args:
            path: Name of the file; the empty name lists the files.
        """
        return self._do(type="read_file", path=path)

    def write_file(self, path: str, text: str) -> str:
        """Replace a file's whole text.

        Args:
            path: Name of the file.
            text: Its new text.
        """
        return self._do(type="write_file", path=path, text=text)

    def edit_file(self, path: str, old: str, new: str) -> str:
        """Replace a part of a file.

        Args:
            path: Name of the file.
            old: What to replace; it must occur exactly once.
            new: What takes its place.
        """
        return self._do(type="edit_file", path=path, old=old, new=new)

    def run(self, horizon: int | None = None) -> str:
        """Train with the workspace's files once and show the losses.

        Args:
            horizon: Length of the schedule in steps. Only on steps tracks, and needed there.
        """
        return self._do(type="run", horizon=horizon)

    def submit(self, claim: int | None = None, horizon: int | None = None) -> str:
        """Have the workspace's files verified. This alone is rewarded.

        Args:
            claim: Steps within which the target is reached. Left out, what your runs make likely to be accepted.
            horizon: Length of the schedule in steps. Left out, that of your last run.
        """
        return self._do(type="submit", claim=claim, horizon=horizon)

    def _do(self, **action: object) -> str:
        if self.over:
            return OVER
        self.failed = self.over = True  # until the environment answers: TRL makes an observation of any exception
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.failed = info.get("error") == "BackendError"
        self.over = terminated or truncated or self.failed
        self.reward += float(reward)
        # half a surrogate pair, which JSON can name, would make the tokenizer raise
        text: str = observation["text"].encode("utf-8", "replace").decode()
        if len(text) > self.characters:
            text = f"{text[: self.characters]}\n[cut after {self.characters} of {len(text)} characters]"
        return text


class Curve(TrainerCallback):
    """A line a step: the mean reward, and of each rollout the reward (null: our side failed) and the ledger."""

    def __init__(self, path: Path, rollouts: Sequence[SpeedrunTools]) -> None:
        self.path, self.rollouts = path, rollouts

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            # what came after the checkpoint is done again
            self.path.write_text("".join(line for line in lines if json.loads(line)["step"] <= state.global_step))

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if state.is_world_process_zero and "reward" in logs:  # the last log, of the whole training, has none
            played = [{"reward": r.get_reward(), "ledger": str(r.env.episode.ledger.path)} for r in self.rollouts]
            with self.path.open("a") as file:
                print(json.dumps({"step": state.global_step, "reward": logs["reward"], "rollouts": played}), file=file)


def train(args: argparse.Namespace, make: Callable[[], Speedrun]) -> GRPOTrainer:
    """Train the model in environments that `make` makes, and save it. However it ends, they are closed."""
    config = GRPOConfig(
        output_dir=str(args.output),
        max_steps=args.steps,
        num_generations=args.generations,
        # a group is played at once but learned from one rollout at a time, which takes less memory
        per_device_train_batch_size=1,
        gradient_accumulation_steps=args.generations,
        max_completion_length=args.tokens,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=args.save_every,
        bf16=torch.cuda.is_available(),
        report_to="none",
        seed=args.seed,
    )
    rollouts: list[SpeedrunTools] = []
    with contextlib.ExitStack() as stack:

        def environment() -> SpeedrunTools:
            env = make()
            stack.callback(env.close)
            rollouts.append(SpeedrunTools(env, args.characters))
            return rollouts[-1]

        curve = Curve(args.output / "curve.jsonl", rollouts)
        trainer = GRPOTrainer(args.model, args=config, environment_factory=environment, callbacks=[curve])
        trainer.train(resume_from_checkpoint=has_checkpoint(args.output))
        trainer.save_model()
    return trainer


def has_checkpoint(output: Path) -> bool:
    return any(output.glob("checkpoint-*"))


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="GRPO on a language model that plays the speedrun.")
    add = parser.add_argument
    add("--model", default="Qwen/Qwen3-1.7B", help="id on the Hugging Face Hub, or folder [%(default)s]")
    add("--tier", default="nano-steps", help="name or folder [%(default)s]")
    add("--steps", type=int, default=50, help="optimizer steps, each of one group of rollouts [%(default)s]")
    add("--generations", type=int, default=8, help="rollouts of a group [%(default)s]")
    add("--runs", type=int, default=4, help="budget of a rollout [%(default)s]")
    add("--submissions", type=int, default=2, help="budget of a rollout [%(default)s]")
    add("--tokens", type=int, default=8192, help="of a rollout, results of its tools included [%(default)s]")
    add("--characters", type=int, default=4000, help="of one tool's result; more is cut [%(default)s]")
    add("--learning-rate", type=float, default=1e-6, help="[%(default)s]")
    add("--save-every", type=int, default=10, help="steps from checkpoint to checkpoint [%(default)s]")
    add("--output", type=Path, default=Path("grpo"), help="folder [%(default)s]")
    add("--seed", type=int, default=0, help="of the language model's sampling; never of a run [%(default)s]")
    add("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    args = parser.parse_args(arguments)
    if has_checkpoint(args.output) and not args.resume:
        parser.error(f"{args.output} holds a training already: --resume goes on with it, or choose another folder")
    return args


def main() -> None:
    args = options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    tier = load_tier(args.tier)
    budget = {"runs": args.runs, "submissions": args.submissions}
    # the clock of an episode goes on while the others of its group are served
    budget["wall_seconds"] = args.generations * tier.table.budget.wall_seconds
    try:
        train(args, lambda: Speedrun(tier.folder, budget=budget, state_dir=args.output / "episodes"))
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing is left running. --resume goes on from the last checkpoint")


if __name__ == "__main__":
    main()

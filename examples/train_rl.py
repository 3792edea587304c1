"""Trains a policy to set the numbers of the start program, by real training in vector environments (docs/agents.md).

    python examples/train_rl.py --output rl-output        # all seeds; goes on where it was interrupted
    cd examples && nanogpt-env compare --agents train_rl:Policy,random,greedy,bayes    # NANOGPT_RL: the folder

An episode is one attempt: the policy chooses all numbers of the start program and the steps claimed; the program is
trained and, if it reached the target, submitted. The reward is what verification grants, plus a fifth of what the run
promises (`SettingsWrapper`), without which nearly all of the first hundred episodes would be worth 0. The curve counts
what is verified only. Needs `pip install 'nanogpt_env[plot,rl,train]'`.
"""

import argparse
import functools
import json
import os
import random
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from nanogpt_env import Stop
from nanogpt_env.actions import Action
from nanogpt_env.env import Speedrun
from nanogpt_env.stats import mean_interval
from nanogpt_env.tracks import Tier
from nanogpt_env.wrappers import Settings, SettingsWrapper

PROMISE = 0.2
GAIN = 0.99
"""a policy that plays submits what claims at most this share of the best so far: its claims differ by some 2 %"""
UPDATE = 16
"""episodes between two updates, of all environments together"""
SETTINGS: dict[str, Any] = {
    "learning_rate": 0.02,  # high, many epochs and no clipping: an episode costs far more than a gradient step
    "n_epochs": 40,
    "batch_size": UPDATE,
    "clip_range": 1.0,
    "max_grad_norm": 5.0,
    "gamma": 0.0,  # episodes have one step
    "policy_kwargs": {"net_arch": [], "log_std_init": -1.2},
    "device": "cpu",
}


def make_env(tier: str, folder: Path) -> SettingsWrapper:
    return SettingsWrapper(Speedrun(tier, state_dir=folder), promise=PROMISE)


class Curve(BaseCallback):
    """Appends each episode to a file, and says how it goes."""

    def __init__(self, path: Path, seed: int, done: int, episodes: int) -> None:
        super().__init__()
        self.path, self.seed, self.done, self.episodes = path, seed, done, episodes
        self.recent: list[float] = []
        self.began = time.monotonic()

    def _on_step(self) -> bool:
        with self.path.open("a") as file:
            for info in self.locals["infos"]:
                self.done += 1
                self.recent = [*self.recent[1 - UPDATE :], info["verified"]]
                spent = info["budget"]["device_seconds"]["spent"] + info["verification_device_seconds"]
                line = {"seed": self.seed, "episode": self.done, "verified": info["verified"]}
                line |= {"device_seconds": spent, "submitted": "verdict" in info}
                line["ledger"] = os.path.relpath(info["ledger"], self.path.parent)
                line["update_seconds"] = time.monotonic() - self.began
                file.write(json.dumps(line) + "\n")
        mean = sum(self.recent) / len(self.recent)
        print(f"seed {self.seed}: {self.done} of {self.episodes} episodes, recovered {mean:.3f} of late", flush=True)
        return True


def read_curve(output: Path) -> list[dict[str, Any]]:
    path = output / "curve.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train(envs: VecEnv, output: Path, seed: int, episodes: int) -> None:
    """One policy, saved after each update; goes on with the one that was saved."""
    path, curve = output / f"policy-{seed}.zip", output / "curve.jsonl"
    per_env = UPDATE // envs.num_envs
    if path.exists():
        model = PPO.load(path, envs, device="cpu", n_steps=per_env)
        torch.seed()  # loading has set the training's own, with which it would try again what it began with
    else:
        model = PPO("MlpPolicy", envs, n_steps=per_env, seed=seed, **SETTINGS)
    # episodes after the last update that was saved taught nothing: they are played again
    kept = [line for line in read_curve(output) if line["seed"] != seed or line["episode"] <= model.num_timesteps]
    curve.write_text("".join(json.dumps(line) + "\n" for line in kept))
    while model.num_timesteps < episodes:
        callback = Curve(curve, seed, model.num_timesteps, episodes)
        model.learn(UPDATE, callback=callback, reset_num_timesteps=False)
        model.save(path.with_suffix(".new.zip"))
        path.with_suffix(".new.zip").replace(path)


def summarize(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per update: mean verified recovered over the seeds with its 95 % interval (Student's t over seeds)."""
    by_update: dict[int, dict[int, list[float]]] = {}  # update, seed, episodes
    for line in lines:
        seeds = by_update.setdefault((line["episode"] - 1) // UPDATE, {})
        seeds.setdefault(line["seed"], []).append(line["verified"])
    rows = []
    for update, seeds in sorted(by_update.items()):
        means = [sum(values) / len(values) for values in seeds.values()]
        interval = mean_interval(means, 0.95) if len(means) > 1 else None
        mean = {"episodes": (update + 1) * UPDATE, "recovered": sum(means) / len(means)}
        rows.append({**mean, "interval": interval, "seeds": dict(zip(seeds, means, strict=True))})
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    x, y = [row["episodes"] for row in rows], [row["recovered"] for row in rows]
    for seed in rows[0]["seeds"]:
        axes.plot(x, [row["seeds"].get(seed) for row in rows], color="C0", lw=0.7, alpha=0.6)
    axes.plot(x, y, marker="o", ms=3, label=f"mean of {len(rows[0]['seeds'])} seeds (thin lines)")
    low, high = zip(*(row["interval"] or (row["recovered"],) * 2 for row in rows), strict=True)
    axes.fill_between(x, low, high, alpha=0.2, label="95 % of the mean")
    axes.set(xlabel="episodes (one attempt each)", ylabel="verified share of the human speedup")
    axes.legend()
    figure.savefig(path, dpi=120)


class Policy:
    """Plays trained policies, one chosen anew for each episode, or the one that `--set policy=0` or the like names: an
    agent for `nanogpt-env play` and `compare`."""

    def __init__(self, tier: Tier, policy: str | int = "*") -> None:
        folder = Path(os.environ.get("NANOGPT_RL", "rl-output"))
        name = f"policy-{policy}.zip"
        found = sorted(path for path in folder.glob(name) if ".new" not in path.name)
        if not found:
            raise FileNotFoundError(f"no {name} in {folder}: train some, or set NANOGPT_RL to their folder")
        self.model, self.settings = PPO.load(random.choice(found), device="cpu"), Settings(tier)
        torch.seed()  # as in `train`; all episodes would try the same
        self.script = self.attempts()
        self.began = False

    def act(self, observation: Any, info: dict[str, Any]) -> Action:
        if not self.began:
            self.began = True
            return next(self.script)
        return self.script.send((observation, info))

    def attempts(self) -> Generator[Action, Any, None]:
        """What the policy deems best, then others that it would try, until the budget allows no run."""
        first = np.zeros(4 + self.settings.size, np.float32)
        first[0] = 1  # what an episode of training begins with: all attempts left
        sure = True
        while True:
            action, _ = self.model.predict(first, deterministic=sure)
            sure, spent = False, False
            attempt = self.settings.attempt(action, GAIN)
            outcome: Any = None
            try:
                while True:
                    outcome = yield attempt.send(outcome)
                    spent = spent or outcome[1].get("error") == "BudgetError"
            except StopIteration:
                if spent:
                    yield Stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", default="nano-steps")
    parser.add_argument("--episodes", type=int, default=112, help="of each seed; a multiple of 16")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--envs", type=int, default=8, choices=[1, 2, 4, 8, 16], help="at a time; they share the cores")
    parser.add_argument("--output", type=Path, default=Path("rl-output"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    maker = functools.partial(make_env, options.tier, options.output / "episodes")
    envs = SubprocVecEnv([maker] * options.envs, start_method="spawn")
    try:
        for seed in range(options.seeds):
            train(envs, options.output, seed, options.episodes)
    finally:
        envs.close()
    rows = summarize(read_curve(options.output))
    (options.output / "summary.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, options.output / "curve.png")
    for row in rows:
        print(f"{row['episodes']:5d} episodes: {row['recovered']:.3f} {row['interval'] or ''}")


if __name__ == "__main__":
    main()

"""The example that learns: on a landscape that is known, and, shorter than in docs/agents.md, by real training."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from fakes import FakeBackend
from stable_baselines3.common.vec_env import DummyVecEnv
from test_search_agents import landscape

from nanogpt_env import Speedrun, WriteFile
from nanogpt_env.agents import play
from nanogpt_env.replay import replay
from nanogpt_env.wrappers import SettingsWrapper

EXAMPLES = Path(__file__).parents[1] / "examples"
NOISE = 0.01


@pytest.fixture
def train_rl(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_rl

    return train_rl


def noisy():
    rng = np.random.default_rng(0)
    return FakeBackend(lambda job, number: landscape(job, number) + rng.normal(0, NOISE))


def environments(train_rl, folder):
    def make():
        return SettingsWrapper(Speedrun("nano-steps", backend=noisy(), state_dir=folder), promise=train_rl.PROMISE)

    return DummyVecEnv([make] * 2)


def means(train_rl, output):
    return [row["recovered"] for row in train_rl.summarize(train_rl.read_curve(output))]


def test_it_learns_what_is_verified(train_rl, tmp_path, monkeypatch):
    envs = environments(train_rl, tmp_path / "episodes")
    for seed in range(2):
        train_rl.train(envs, tmp_path, seed, 96)
    curve = means(train_rl, tmp_path)
    assert len(curve) == 6
    assert curve[0] < 0.1 and curve[-1] > curve[0] + 0.1
    rows = train_rl.summarize(train_rl.read_curve(tmp_path))
    low, high = rows[-1]["interval"]
    assert low < curve[-1] < high and len(rows[-1]["seeds"]) == 2
    # what the curve says is what the ledgers say
    for line in train_rl.read_curve(tmp_path)[-20:]:
        assert replay(tmp_path / line["ledger"]).recovered == pytest.approx(line["verified"], abs=1e-9)
    train_rl.draw(rows, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000

    monkeypatch.setenv("NANOGPT_RL", str(tmp_path))
    env = Speedrun("nano-steps", backend=noisy(), state_dir=tmp_path / "played", budget={"runs": 12})
    played = play(env, train_rl.Policy(env.tier, policy=1))
    env.close()
    assert played.info["recovered"] > 0.1
    assert played.steps[-1]["type"] == "stop" and len(played.runs) == 12


def test_it_goes_on_after_the_last_update(train_rl, tmp_path):
    envs = environments(train_rl, tmp_path / "episodes")
    train_rl.train(envs, tmp_path, 0, 32)
    whole = train_rl.read_curve(tmp_path)
    with (tmp_path / "curve.jsonl").open("a") as file:  # played, but not learned from when it was interrupted
        file.write(json.dumps({**whole[-1], "episode": 33}) + "\n")
    (tmp_path / "policy-0.new.zip").write_bytes(b"half of a")
    train_rl.train(envs, tmp_path, 0, 48)
    again = train_rl.read_curve(tmp_path)
    assert again[:32] == whole
    assert [line["episode"] for line in again] == list(range(1, 49))


def test_a_policy_tries_something_else_in_each_episode(train_rl, tmp_path, monkeypatch):
    train_rl.train(environments(train_rl, tmp_path / "episodes"), tmp_path, 0, 16)
    monkeypatch.setenv("NANOGPT_RL", str(tmp_path))
    tier = Speedrun("nano-steps", backend=FakeBackend()).tier

    def tried():
        """The first program and the second."""
        script = train_rl.Policy(tier).attempts()
        first = next(script)
        action = first
        while action == first or not isinstance(action, WriteFile):
            action = script.send(({}, {"error": "BudgetError"}))
        return first.text, action.text

    (best, one), (again, another) = tried(), tried()
    assert best == again and one != another


def test_without_policies_the_way_out_is_named(train_rl, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPT_RL", str(tmp_path))
    (tmp_path / "policy-0.zip").touch()
    with pytest.raises(FileNotFoundError, match=r"policy-1\.zip.*NANOGPT_RL"):
        train_rl.Policy(Speedrun("nano-steps", backend=FakeBackend()).tier, policy=1)


def test_a_rising_curve_by_real_training(tmp_path):
    """One seed, on the tier of the tests, in two processes."""
    command = [sys.executable, EXAMPLES / "train_rl.py", "--tier", TINY, "--episodes", "48", "--seeds", "1"]
    command += ["--envs", "2"]  # each is a process that loads a lot
    done = subprocess.run([*command, "--output", tmp_path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [row["episodes"] for row in rows] == [16, 32, 48]
    assert rows[-1]["recovered"] > rows[0]["recovered"] + 0.1
    lines = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert all(replay(tmp_path / line["ledger"]).recovered == pytest.approx(line["verified"]) for line in lines[-8:])

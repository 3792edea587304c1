"""What tests of episodes share: a tier, scripted runs, and short names for what is looked at."""

import pytest
from conftest import TINY

from nanogpt_env import Submit
from nanogpt_env.budget import RUN_METERS
from nanogpt_env.ledger import read_ledger
from nanogpt_env.tiers import load_tier

TIER = load_tier(TINY)
START, ANCHOR = TIER.value_of("slow"), TIER.value_of("fast")
SLOW, FAST = (TIER.records[name].sources["optimizer.py"] for name in ("slow", "fast"))
ACCEPTED_N = TIER.loss_test().decide([4.5] * 6).n
CLAIM = Submit(claim=60, horizon=60)
INFO = {
    "episode_id", "ledger", "snapshot", "best", "recovered", "budget", "verification_device_seconds", "running",
}  # fmt: skip


def share(steps):
    return (START - steps) / (START - ANCHOR)


class NoTraining:
    """Fails the test when anything is trained."""

    def start(self, job, share=False):
        raise AssertionError(f"a run was started: {job.steps} steps")

    def exclusive(self, on_wait=lambda: None):
        raise AssertionError("the whole machine was asked for")

    def close(self):
        pass


def do(env, *actions):
    """Steps; the last one's result, whose observation must be one."""
    for action in actions:
        result = env.step(action)
        assert env.observation_space.contains(result[0]), result[0]
    return result


def spent(env, meter):
    return env.episode.budget.spent(meter)


def nothing_reserved(env):
    budget = env.episode.budget
    return all(budget.left(m) == pytest.approx(budget.limits[m] - budget.spent(m)) for m in RUN_METERS)


def lines(env, kind):
    return [line for line in read_ledger(env.episode.ledger.path)[0] if line["kind"] == kind]


def interrupt(what, handle):
    raise KeyboardInterrupt

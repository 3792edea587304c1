"""The scripted agent and the loop that plays it."""

import pytest
from episodes import SLOW, TIER, share
from fakes import LOST, FakeBackend

from nanogpt_env import BackendError
from nanogpt_env.agents import LadderAgent, play


def test_the_ladder_agent_climbs_and_claims_too_much_once(make):
    crossing = {"slow": TIER.measured.records["slow"].steps_mean, "fast": TIER.measured.records["fast"].steps_mean}

    def script(job, number):
        name = "slow" if job.source == SLOW else "fast"
        return TIER.table.training.target - 0.05 * (job.steps - crossing[name])

    env = make(FakeBackend(script))
    played = play(env, LadderAgent(env.tier))
    assert [v["accepted"] for v in played.verdicts] == [False, True]
    overclaim, claim = (v["claim"] for v in played.verdicts)
    assert overclaim < crossing["fast"] < claim
    assert played.total_reward == pytest.approx(share(claim))
    assert [run["exit_reason"] for run in played.runs] == ["completed", "completed"]
    assert played.info["recovered"] == pytest.approx(played.total_reward)
    assert played.info["best"] == played.verdicts[1]["value"] == claim


def test_play_stops_when_our_side_fails(make):
    env = make(FakeBackend(lambda job, number: LOST))
    with pytest.raises(BackendError, match="node lost"):
        play(env, LadderAgent(env.tier))

"""Numbers in and out, text in and out: what a step does, and that standard checkers accept it."""

import json
import math

import gymnasium
import numpy as np
import pytest
from fakes import LOST, FakeBackend, ran
from test_search_agents import TIER, landscape

from nanogpt_env import ActionError, BackendError, Speedrun
from nanogpt_env.actions import ACTION_NAMES, describe_actions, parse_action, tool_schemas
from nanogpt_env.wrappers import Settings, SettingsWrapper, TextWrapper, find_action

START = TIER.span().start_value
BETTER = np.array([0.66, -0.3, 0.3, -0.6, -0.5, math.log2(225 / START)], np.float32)  # near the landscape's best
ZEROS = np.zeros(6, np.float32)


def made(tmp_path, script=landscape, budget=None, **wrapper):
    env = Speedrun("nano-steps", backend=FakeBackend(script), state_dir=tmp_path, budget=budget)
    return SettingsWrapper(env, **wrapper)


def test_zeros_are_the_start_program_at_its_own_claim():
    settings = Settings(TIER)
    assert settings.names == ("LEARNING_RATE", "WARMUP_STEPS", "betas[0]", "betas[1]", "weight_decay")
    assert settings.program(ZEROS) == (TIER.record("adamw").sources["optimizer.py"], round(START))
    assert settings.program(np.array([0, 0, 0, 0, 0, -1], np.float32))[1] == round(START / 2)
    assert "LEARNING_RATE = 0.016" in settings.program(np.array([1, 0, 0, 0, 0, 0], np.float32))[0]


@pytest.mark.parametrize("action", [[0] * 5, [0] * 7, [math.nan] * 6, [math.inf, *[0] * 5], [[0] * 6]])
def test_numbers_out_of_the_space_are_refused(action, tmp_path):
    env = made(tmp_path)
    env.reset()
    with pytest.raises(ValueError, match="6 finite numbers"):
        env.step(np.array(action))
    assert env.env.episode.runs == {}
    env.close()


def test_an_attempt_is_written_run_and_submitted(tmp_path):
    env = made(tmp_path)
    first, _ = env.reset()
    observation, reward, terminated, truncated, info = env.step(BETTER)
    assert terminated and not truncated
    assert [name for name, _ in env.env.history] == ["write_file", "run", "submit", "stop"]
    assert reward == info["verified"] == info["recovered"] > 0.3
    assert first.tolist() == [1] + [0] * 9
    assert observation[:3] == pytest.approx([0, info["recovered"], 1])
    assert observation[3] < 0
    assert observation[4:] == pytest.approx(BETTER)
    assert observation in env.observation_space
    env.close()


@pytest.mark.parametrize("action", [ZEROS, np.array([0, 0, 0, 0, 0, -1]), np.array([-1, 0, 0, 0, 0, 1])])
def test_what_cannot_be_rewarded_is_not_submitted(action, tmp_path):
    env = made(tmp_path, attempts=2)
    env.reset()
    _, reward, terminated, _, info = env.step(action)
    assert (reward, terminated) == (0, False)
    assert "verdict" not in info
    env.close()


def test_a_promise_is_paid_on_top_and_told_apart(tmp_path):
    env = made(tmp_path, promise=0.5)
    env.reset()
    _, reward, _, _, info = env.step(BETTER)
    assert info["verified"] == info["recovered"] < reward
    env.reset()
    _, reward, _, _, info = env.step(np.array([-1, 0, 1, 1, 0, 0]))
    assert info["verified"] == 0 > reward >= -1.5
    env.close()


def test_a_run_that_fails_promises_the_least(tmp_path):
    env = made(tmp_path, lambda job, number: ran(job, 9.0, reason="nonfinite_loss"), promise=1.0)
    env.reset()
    observation, reward, _, _, _ = env.step(BETTER)
    assert (reward, observation[3]) == (-3, 3)
    env.close()


def test_later_attempts_are_paid_for_what_they_add(tmp_path):
    env = made(tmp_path, attempts=3)
    env.reset()
    rewards = [env.step(a)[1] for a in (BETTER, BETTER, [*BETTER[:5], BETTER[5] - 0.05])]
    assert rewards[0] > 0 == rewards[1]
    assert 0 < rewards[2] < rewards[0]
    env.close()


def test_a_spent_budget_truncates(tmp_path):
    env = made(tmp_path, budget={"runs": 1}, attempts=9)
    env.reset()
    assert env.step(BETTER)[3] is False
    *_, terminated, truncated, _ = env.step(BETTER)
    assert truncated and not terminated
    env.close()


def test_a_failure_of_ours_is_no_result(tmp_path):
    def lost(job, number):
        raise LOST

    env = made(tmp_path, lost)
    env.reset()
    with pytest.raises(BackendError, match="node lost"):
        env.step(BETTER)
    env.close()


def test_promises_are_for_steps(tmp_path):
    with pytest.raises(ActionError, match="steps tracks"):
        SettingsWrapper(Speedrun("nano-wallclock", state_dir=tmp_path), promise=1.0)
    env = SettingsWrapper(Speedrun("nano-wallclock", state_dir=tmp_path))
    assert env.action_space.shape == (len(env.settings.names),)


def test_another_program(tmp_path):
    env = made(tmp_path, source="RATE = 0.1\n")
    assert env.settings.names == ("RATE",)
    with pytest.raises(ActionError, match="no numbers"):
        made(tmp_path, source="import torch\n")


# the checker prefers bare environments, but it is the wrapper that is checked
@pytest.mark.filterwarnings("ignore:.*is different from the unwrapped.*")
def test_gymnasium_accepts_them(tmp_path):
    from gymnasium.utils.env_checker import check_env

    env = gymnasium.make("NanoGPT/NanoSteps-v0", backend=FakeBackend(landscape), state_dir=tmp_path)
    check_env(SettingsWrapper(env, attempts=2), skip_render_check=True)


# --- text ---


def text_env(tmp_path, script=landscape):
    return TextWrapper(Speedrun("nano-steps", backend=FakeBackend(script), state_dir=tmp_path))


def test_a_language_model_plays_an_episode(tmp_path):
    env = text_env(tmp_path)
    text, _ = env.reset()
    assert "- submit([claim], [horizon])" in text
    source, claim = Settings(TIER).program(BETTER)
    write = {"type": "write_file", "path": "optimizer.py", "text": source}
    replies = [
        f"A higher rate.\n```json\n{json.dumps(write)}\n```\nThat is all.",
        f'So: {{"type": "run", "horizon": {claim}}}',
        f'```\n{{"type": "submit", "claim": {claim}, "horizon": {claim}}}\n```',
        '{"type": "stop"}',
    ]
    steps = [env.step(reply) for reply in replies]
    assert steps[2][1] > 0.3
    assert "left: device_seconds" in steps[0][0]
    assert [step[2] for step in steps] == [False, False, False, True]
    env.close()


@pytest.mark.parametrize("reply", ["", "I give up.", "{", "}{", "```json\n```", "{" * 100_000, "```json\n" * 20_000])
def test_a_reply_without_an_action_is_told_so(reply, tmp_path):
    env = text_env(tmp_path)
    env.reset()
    text, reward, terminated, truncated, info = env.step(reply)
    assert "refused" in text and (reward, terminated, truncated) == (0, False, False)
    assert info["error"] == "ActionError"
    env.close()


def test_the_last_block_counts():
    assert find_action('```json\n{"a": 1}\n```\nno:\n```json\n{"b": 2}\n```') == '{"b": 2}\n'
    assert find_action('so {"type": "note", "text": "{}"} it is') == '{"type": "note", "text": "{}"}'


def test_every_action_is_described():
    assert [line.split("(")[0][2:] for line in describe_actions().splitlines()] == list(ACTION_NAMES)
    for name, (text, schema) in tool_schemas().items():
        assert text and set(schema["required"]) <= set(schema["properties"])
        assert not {"title", "anyOf"} & {key for field in schema["properties"].values() for key in field}
        values = {"string": "x", "integer": 1, "boolean": True}
        fields = {key: values[field["type"]] for key, field in schema["properties"].items()}
        assert parse_action({"type": name, **fields}).type == name


def test_vector_environments(tmp_path):
    envs = gymnasium.vector.SyncVectorEnv([lambda: made(tmp_path) for _ in range(2)])
    envs.reset()
    _, rewards, terminated, _, _ = envs.step(np.stack([BETTER, ZEROS]))
    assert rewards[0] > 0.3 and rewards[1] == 0
    assert terminated.all()
    envs.close()

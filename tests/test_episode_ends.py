"""How an episode ends, and what is kept of it."""

import json
import math
import stat

import gymnasium
import pytest
from conftest import TINY
from episodes import ACCEPTED_N, CLAIM, FAST, INFO, SLOW, TIER, do, lines, share, spent
from fakes import FakeBackend, hidden_losses, ran

from nanogpt_env import Cancel, LedgerError, Note, ReadFile, Run, Speedrun, Stop, Submit, WriteFile
from nanogpt_env.budget import RUN_METERS
from nanogpt_env.ledger import VERSION
from nanogpt_env.replay import replay

# --- how an episode ends ---


def test_stop_terminates(make):
    env = make()
    _, reward, terminated, truncated, info = do(env, Note(text="x"), Stop())
    assert (reward, terminated, truncated) == (0, True, False)
    assert lines(env, "end")[0]["reason"] == "stopped by the agent"
    assert set(info) == INFO


@pytest.mark.parametrize("action", [{"type": "stop", "now": 1}, "stop", '{"type": "Stop"}'])
def test_a_malformed_stop_does_not(make, action):
    env = make()
    _, _, terminated, truncated, info = do(env, action)
    assert not terminated and not truncated
    assert info["error"] == "ActionError"


def test_spent_steps_truncate(make):
    env = make(budget={"episode_steps": 2})
    assert do(env, Note(text="x"))[2:4] == (False, False)
    observation, _, terminated, truncated, _ = do(env, Note(text="x"))
    assert (terminated, truncated) == (False, True)
    assert "The episode is over: episode_steps is spent." in observation["text"]
    assert lines(env, "end")[0]["reason"] == "budget spent: episode_steps"


def test_stop_at_the_last_step_is_the_agents(make):
    env = make(budget={"episode_steps": 1})
    assert do(env, Stop())[2:4] == (True, False)


def test_spent_time_truncates(make, monkeypatch):
    env = make()
    budget = env.episode.budget
    now = [budget._clock()]
    monkeypatch.setattr(budget, "_clock", lambda: now[0])
    now[0] += 3500
    assert do(env, Note(text="x"))[2:4] == (False, False)
    now[0] += 101
    assert do(env, Note(text="x"))[2:4] == (False, True)
    assert lines(env, "end")[0]["reason"] == "budget spent: wall_seconds"


@pytest.mark.parametrize("loss", [4.5, 5.2])
def test_the_last_submission_truncates_after_it_is_paid(make, loss):
    env = make(FakeBackend(lambda job, number: loss), budget={"submissions": 1})
    _, reward, terminated, truncated, _ = do(env, CLAIM)
    assert (terminated, truncated) == (False, True)
    assert reward == (pytest.approx(share(60)) if loss < 5 else 0)


def test_a_spent_research_budget_ends_nothing(make):
    env = make(budget={"runs": 1, "device_seconds": 1, "tokens": 1e5, "flops": 1e12})
    assert do(env, Run(horizon=100), Note(text="x"))[2:4] == (False, False)


def test_before_and_after_an_episode_there_is_no_step(make, tmp_path):
    fresh = Speedrun(TINY, backend=FakeBackend(), state_dir=tmp_path)
    for use in (lambda: fresh.step(Stop()), lambda: fresh.checkpoint(), lambda: fresh.fork()):
        with pytest.raises(gymnasium.error.ResetNeeded):
            use()
    env = make()
    kept = env.checkpoint()
    do(env, Stop())
    for use in (lambda: env.step(ReadFile()), lambda: env.restore(kept), lambda: env.fork()):
        with pytest.raises(gymnasium.error.ResetNeeded, match="stopped by the agent"):
            use()
    env.reset()
    assert do(env, ReadFile())[2:4] == (False, False)


def test_closing_twice_is_harmless_and_ends_the_episode(make):
    env = make(backend := FakeBackend(hold={1}))
    do(env, Run(horizon=100, wait=False))
    env.close()
    env.close()
    assert backend.runs[0].cancelled
    assert lines(env, "end")[0]["reason"] == "closed"
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(ReadFile())


def test_closing_on_a_full_disk_still_closes_the_backend(make, monkeypatch):
    env = make(backend := FakeBackend())

    def full(*_, **__):
        raise LedgerError("no space")

    monkeypatch.setattr(env.episode.ledger, "append", full)
    with pytest.raises(LedgerError, match="no space"):
        env.close()
    assert backend.closed == 1


def test_reset_ends_the_episode_before_it(make):
    env = make(backend := FakeBackend(hold={1}))
    do(env, Run(horizon=100, wait=False), WriteFile(path="optimizer.py", text=FAST))
    first = env.episode
    _, info = env.reset()
    assert backend.runs[0].cancelled
    assert first.over == "reset"
    assert info["episode_id"] != first.id
    assert info["budget"]["runs"]["spent"] == 0
    assert env.workspace.files == {"optimizer.py": SLOW}


# --- what is kept ---


def test_evidence_is_sealed_and_complete(make):
    env = make(backend := FakeBackend(hidden_losses([4.5, 4.51, 4.52, 4.53, 4.54, 4.55])))
    do(env, CLAIM)
    path = env.episode.folder / "evidence" / "submission-1.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(env.episode.ledger.path.stat().st_mode) == 0o600
    evidence = json.loads(path.read_text())
    n = env.episode.verdicts[0].n
    assert [r["seed"] for r in evidence["reruns"]] == [job.seed for job in backend.jobs[:n]]
    assert [r["loss"] for r in evidence["reruns"]] == [4.5, 4.51, 4.52, 4.53, 4.54, 4.55][:n]
    assert evidence["sources"] == {"optimizer.py": SLOW}
    assert evidence["snapshot"] == env.workspace.snapshot
    assert (evidence["claim"], evidence["horizon"], evidence["accepted"]) == (60, 60, True)
    assert evidence["tests"] == {"loss": pytest.approx(vars(TIER.loss_test()))}
    assert (evidence["start"], evidence["time"]) == ("slow", None)
    assert {(r["role"], r["session"]) for r in evidence["reruns"]} == {("candidate", 0)}
    assert evidence["versions"] and evidence["hardware"] and evidence["sandbox"]["name"] == "fake"


def test_nothing_that_the_agent_sees_tells_a_rerun_apart(make):
    losses = [4.50137, 4.51337, 4.52637, 4.53937, 4.54337, 4.55737]
    env = make(backend := FakeBackend(hidden_losses(losses)))
    observation, _, _, _, info = do(env, CLAIM)
    seen = observation["text"] + json.dumps(info) + json.dumps(env.checkpoint()) + do(env, ReadFile())[0]["text"]
    for job, loss in zip(backend.jobs, losses, strict=False):
        assert job.seed[:10] not in seen
        assert f"{loss:.3f}" not in seen


def test_the_ledger_replays_to_the_same_rewards(make):
    env = make(FakeBackend(hidden_losses([4.5] * (ACCEPTED_N + 1) + [5.2, 5.2] + [4.5] * 8)))
    claims = [CLAIM, Submit(claim=40, horizon=60), CLAIM, Submit(claim=55, horizon=60)]
    rewards = [do(env, Run(horizon=100), claim)[1] for claim in claims]
    do(env, Stop())
    path = env.episode.ledger.path
    found = replay(path)
    assert found.differences == []
    assert found.total_reward == pytest.approx(sum(rewards)) == pytest.approx(share(55))
    assert (found.best, found.recovered) == (55, pytest.approx(share(55)))
    assert [s["accepted"] for s in found.submissions] == [True, False, True]
    # and disagrees once somebody has changed a loss
    text = path.read_text()
    assert text.count('"loss": 5.2') == 1
    path.write_text(text.replace('"loss": 5.2', '"loss": 4.2'))
    assert replay(path).differences


def test_the_ledger_has_every_action_charge_and_run(make):
    env = make(hold_first := FakeBackend(hold={1}))
    do(env, Run(horizon=100, wait=False), "garbage", Cancel(handle="run-1"), Run(horizon=100, seed=3), CLAIM, Stop())
    assert len(hold_first.jobs) > 2
    assert [line["type"] for line in lines(env, "action")] == ["run", "malformed", "cancel", "run", "submit", "stop"]
    assert [line["error"] for line in lines(env, "action")] == ["", "ActionError", "", "", "", ""]
    assert [line["exit_reason"] for line in lines(env, "run")] == ["cancelled", "completed"]
    assert [line["handle"] for line in lines(env, "charge")] == ["run-1", "run-2", "submission-1"]
    assert lines(env, "charge")[1]["spent"] == {m: spent(env, m) for m in RUN_METERS}
    head = lines(env, "episode")[0]
    assert (head["version"], head["track"], head["fingerprint"]) == (VERSION, "steps", TIER.fingerprint())
    assert head["tests"] == TIER.trial_fields()
    verdict = lines(env, "verdict")[0]
    assert (verdict["value"], verdict["claim"], verdict["time"]) == (60, 60, None)
    assert len(lines(env, "rerun")) == verdict["n"]
    for rerun in lines(env, "rerun"):
        assert set(rerun) == {
            "seq", "kind", "submission", "n", "role", "session", "exit_reason", "loss", "train_seconds",
            "device_seconds",
        }  # fmt: skip
        assert (rerun["role"], rerun["session"]) == ("candidate", 0)


def test_a_point_that_is_not_finite_does_not_stop_the_episode(make):
    points = ((50, math.nan), (80, math.inf), (100, 4.5))
    env = make(FakeBackend(lambda job, number: ran(job, 4.5, val_points=points)))
    do(env, Run(horizon=100), Submit(horizon=100))
    assert lines(env, "run")[0]["val_points"] == [[50, None], [80, None], [100, 4.5]]

"""Checkpoints, restore and forks."""

import json
import threading
import time

import gymnasium
import pytest
from episodes import CLAIM, FAST, SLOW, do, lines, share, spent
from fakes import FakeBackend, hidden_losses

from nanogpt_env import ActionError, Note, Poll, ReadFile, Revert, Run, Stop, Submit, WriteFile


def test_restore_brings_files_notes_and_history_back_and_no_meter(make):
    env = make()
    do(env, Note(text="plan"), WriteFile(path="optimizer.py", text=FAST))
    kept = json.loads(json.dumps(env.checkpoint()))
    do(env, Run(horizon=100), CLAIM, WriteFile(path="optimizer.py", text="x = 1"), Note(text="worse"))
    env.restore(kept)
    assert env.workspace.files == {"optimizer.py": FAST}
    assert env.workspace.notes == "plan\n"
    assert [name for name, _ in env.history] == ["note", "write_file"]
    assert (spent(env, "runs"), spent(env, "submissions"), spent(env, "episode_steps")) == (1, 1, 6)
    assert env.episode.best == 60
    assert do(env, CLAIM)[4]["verdict"]["cached"] is True  # the verdict is still known
    assert do(env, Poll(handle="run-1"))[4]["run"]["done"]
    assert lines(env, "restore")


def test_a_checkpoint_is_no_window_into_the_environment(make):
    env = make()
    kept = env.checkpoint()
    kept["files"]["optimizer.py"] = "changed"
    kept["snapshots"].clear()
    assert env.workspace.files == {"optimizer.py": SLOW}
    assert do(env, Revert())[4].get("error") is None


def test_a_checkpoint_of_another_episode_is_refused(make):
    env = make()
    kept = env.checkpoint()
    env.reset()
    with pytest.raises(ActionError, match="the checkpoint is of episode"):
        env.restore(kept)


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: None,
        lambda kept: [],
        lambda kept: kept | {"history": [{"a": 1}]},
        lambda kept: kept | {"history": 5},
        lambda kept: kept | {"history": [("note", 5)]},
        lambda kept: kept | {"notes": None},
        lambda kept: kept | {"notes": "\ud800"},
        lambda kept: kept | {"notes": "\x1b[31mred"},
    ],
)
def test_what_is_no_checkpoint_is_refused_and_changes_nothing(make, damage):
    env = make()
    do(env, Note(text="plan"))
    before = env.checkpoint()
    with pytest.raises(ActionError):
        env.restore(damage(env.checkpoint()))
    assert env.checkpoint() == before


def test_a_fork_that_ends_the_episode_leaves_another_its_verdict(make):
    """One verifies with the last submission; another, whose own is refused, ends the episode meanwhile."""
    backend = FakeBackend(hidden_losses([4.0] * 20), hold={1})
    env = make(backend, budget={"submissions": 1})
    do(env, WriteFile(path="optimizer.py", text=FAST))
    twin, found = env.fork(), []
    worker = threading.Thread(target=lambda: found.append(env.step(CLAIM)))
    worker.start()
    until = time.monotonic() + 10
    while not backend.runs and time.monotonic() < until:
        time.sleep(0.01)
    assert twin.step(Submit(claim=70, horizon=70))[3]  # truncated: nothing is left to submit
    assert env.episode.over and not found
    backend.runs[0].held = False
    worker.join(20)
    assert found[0][1] == pytest.approx(share(60))
    assert lines(env, "end")[0]["recovered"] == pytest.approx(share(60))


def test_a_fork_has_its_own_workspace_and_shares_the_account(make):
    env = make(backend := FakeBackend())
    do(env, Note(text="plan"), Run(horizon=100))
    twin = env.fork()
    assert (twin.history, twin.workspace.notes) == (env.history, "plan\n")
    assert twin.workspace.files == env.workspace.files
    do(twin, WriteFile(path="optimizer.py", text=FAST), Note(text="mine"))
    assert env.workspace.files == {"optimizer.py": SLOW}
    assert env.workspace.notes == "plan\n"
    do(twin, Run(horizon=100))
    assert spent(env, "runs") == 2
    assert do(twin, CLAIM)[1] == pytest.approx(share(60))
    _, reward, _, _, info = do(env, Submit(claim=70, horizon=70))
    assert (reward, info["best"]) == (0, 60)  # the parent is paid for what beats the fork only
    started = len(backend.jobs)
    _, reward, _, _, info = do(env, WriteFile(path="optimizer.py", text=FAST), CLAIM)
    assert (reward, info["verdict"]["cached"]) == (0, True)
    assert len(backend.jobs) == started
    assert do(twin, ReadFile())[4]["budget"]["submissions"]["spent"] == 2
    assert do(twin, Revert())[4].get("error") is None


def test_closing_a_fork_leaves_the_episode_alone(make):
    env = make(backend := FakeBackend(hold={1}))
    do(env, Run(horizon=100, wait=False))
    twin = env.fork()
    twin.close()
    assert (backend.closed, env.episode.over) == (0, "")
    do(env, ReadFile())
    twin = env.fork()
    twin.reset()  # from here on it has an episode of its own, on the shared backend
    assert twin.episode is not env.episode
    assert env.episode.over == ""
    twin.close()
    assert (backend.closed, twin.episode.over) == (0, "closed")
    assert do(env, ReadFile())[4]["running"] == ["run-1"]


def test_the_end_of_the_episode_is_that_of_its_forks(make):
    env = make()
    twin = env.fork()
    do(twin, Stop())
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(ReadFile())

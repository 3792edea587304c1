"""A folder that is kept in step with an episode: what is taken from it, and what an episode remembers between calls."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import TINY
from episodes import FAST, SLOW
from processes import left_after, of_this_process
from test_cli import COMMAND, call, call_json, refused

from nanogpt_env.replay import replay
from nanogpt_env.serving.attach import Checkout
from nanogpt_env.tiers import load_tier

TIER = load_tier(TINY)
CLAIM = TIER.measured.records["fast"].claim or TIER.records["fast"].horizon


@pytest.fixture
def folder(tmp_path):
    """An attached one."""
    done = call("attach", tmp_path / "work", "--tier", TINY, "--output", tmp_path / "state")
    assert done.returncode == 0, done.stderr
    return tmp_path / "work"


def episode_of(folder):
    return Checkout(folder).known()["episode"]


def test_edits_runs_and_a_verified_reward(folder, tmp_path):
    assert (folder / "optimizer.py").read_text() == SLOW
    assert (folder / "task.md").read_text() == TIER.task
    (folder / "optimizer.py").write_text(FAST)
    (folder / "notes.txt").write_text("mine")
    horizon = TIER.records["fast"].horizon
    ran = call_json("attach", folder, "run", "--horizon", horizon)
    assert ran["changed"] == ["optimizer.py"] and ran["run"]["exit_reason"] == "completed"
    submitted = call_json("attach", folder, "submit", "--claim", CLAIM, "--horizon", horizon)
    assert submitted["verdict"]["accepted"] and submitted["reward"] > 0
    assert submitted["verdict"]["trusted"] is False, "the agent shares our user"
    status = call_json("attach", folder, "status")
    assert status["recovered"] == pytest.approx(submitted["recovered"])
    assert status["budget"]["runs"]["spent"] == 1
    assert "recovered" in call("attach", folder, "stop").stdout
    refused(call("attach", folder, "run"), "has ended")
    assert replay(tmp_path / "state" / os.path.basename(episode_of(folder))).differences == []


def test_no_second_episode_and_nothing_that_the_folder_says(folder, tmp_path):
    """Whoever could name an episode or tier in the folder would have that of others, or code run as the operator."""
    for path in folder.iterdir():
        path.unlink()
    refused(call("attach", folder), "optimizer.py")
    (folder / "optimizer.py").write_text(FAST)
    refused(call("attach", folder, "--budget", "runs=1000"), "keeps its tier")
    refused(call("attach", folder, "--judge", "subprocess:Popen"), "keeps its tier")
    assert call_json("attach", folder)["changed"] == ["optimizer.py"]
    assert len(list((tmp_path / "state").glob("*/ledger.jsonl"))) == 1
    refused(call("attach", tmp_path / "b", "--judge", "subprocess:Popen"), "is no judge")


@pytest.mark.parametrize("what", ["link", "pipe", "folder", "missing", "large", "no text", "hidden characters"])
def test_what_is_no_plain_file_of_text_is_refused(what, folder, tmp_path):
    path = folder / "optimizer.py"
    path.unlink()
    secret = tmp_path / "secret"
    secret.write_text("a = 'of the operator'\n")
    {
        "link": lambda: path.symlink_to(secret),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "missing": lambda: None,
        "large": lambda: path.write_text("#" * (TIER.table.limits.source_bytes + 1)),
        "no text": lambda: path.write_bytes(b"\xff\xfe"),
        "hidden characters": lambda: path.write_text("x = 1  # \u202e\n", encoding="utf-8"),
    }[what]()
    refused(call("attach", folder, "run"), "optimizer.py")
    state = json.loads((tmp_path / "state" / os.path.basename(episode_of(folder)) / "checkpoint.json").read_text())
    assert state["files"]["optimizer.py"] == SLOW


def test_time_passes_between_calls(folder, tmp_path):
    first = call_json("attach", folder, "status")["budget"]["wall_seconds"]["spent"]
    time.sleep(2)
    assert call_json("attach", folder, "status")["budget"]["wall_seconds"]["spent"] >= first + 2


def test_wrong_calls(folder, tmp_path):
    refused(call("attach", folder, "run", "--claim", 3), "run takes no --claim")
    refused(call("attach", folder, "dance"), "dance")
    refused(call("attach", folder, "run", "--tier", "micro-steps"), "keeps its tier")
    refused(call("attach", tmp_path / "new", "--tier", "nowhere"), "nowhere")
    for judge in ("static=veto,tokens=x", "static=maybe", "static,tokens"):
        refused(call("attach", tmp_path / "new", "--tier", TINY, "--judge", judge), judge)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "optimizer.py").write_text("mine\n")
    refused(call("attach", tmp_path / "full", "--tier", TINY), "optimizer.py already")
    assert (tmp_path / "full" / "optimizer.py").read_text() == "mine\n"
    mark = Checkout(folder).mark
    known = json.loads(mark.read_text())
    mark.write_text("{")
    refused(call("attach", folder), "damaged")
    mark.write_text(json.dumps(known | {"episode": str(tmp_path / "gone")}))
    refused(call("attach", folder), "cannot be gone on with")


def test_a_program_that_is_refused_changes_nothing(folder):
    (folder / "optimizer.py").write_text("import os\n")
    refused(call("attach", folder, "run"), "may not import os", code=1)
    assert call_json("attach", folder, "status")["budget"]["runs"]["spent"] == 0


def test_two_at_once_and_an_interruption(tmp_path):
    folder, before = tmp_path / "long", of_this_process()
    call("attach", folder, "--tier", "nano-steps", "--output", tmp_path / "state")
    command = [COMMAND, "attach", str(folder), "run", "--horizon", "600"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        while '"reserve"' not in Path(episode_of(folder), "ledger.jsonl").read_text():
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.1)
        refused(call("attach", folder, "status"), "written by another environment")
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 130
    assert left_after(of_this_process() - before, 10) == []
    assert call_json("attach", folder, "status")["budget"]["runs"]["spent"] == 1

"""The command on a tier of the wallclock track, trained for real."""

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import descendants, left_after
from test_cli import COMMAND, call, call_json

from nanogpt_env.tiers import host_timing_path, load_tier

TINY = Path(__file__).parent / "tiny-wallclock"
TIER = load_tier(TINY)


@pytest.fixture
def candidate(tmp_path):
    folder = tmp_path / "candidate"
    assert call("new", folder, "--tier", TINY, "--record", "fast").returncode == 0
    return folder


def test_new_makes_a_train_py(candidate):
    assert sorted(p.name for p in candidate.iterdir()) == ["task.md", "train.py"]
    assert (candidate / "train.py").read_text() == TIER.records["fast"].sources["train.py"]


def test_show_has_the_tiers_own_columns():
    text = call("tiers", "show", TINY).stdout
    assert "table floor" in text and "sd of a pair 10.00%" in text and "`tiers time`" in text
    assert call_json("tiers", "show", TINY)["track"] == "wallclock"


def test_a_run_shows_its_time(candidate):
    text = call("run", candidate, "--tier", TINY).stdout
    assert "completed, 120 batches" in text and "train_seconds" in text
    again = call_json("run", candidate, "--tier", TINY)
    assert again["shared"] is True  # the same program: trained by the call before
    assert again["train_seconds"] > 0


@pytest.mark.parametrize("option", ["--steps", "--horizon"])
def test_steps_are_refused(candidate, option):
    done = call("run", candidate, "--tier", TINY, option, "5")
    assert done.returncode == 2
    assert "wallclock tier" in done.stderr


def test_the_wrong_kind_of_candidate_is_named(tmp_path):
    (tmp_path / "optimizer.py").write_text("def configure(params, horizon): ...")
    done = call("run", tmp_path, "--tier", TINY)
    assert done.returncode == 2
    assert "has no train.py, which tiny-wallclock asks for" in done.stderr


def test_a_submission_is_timed_and_its_ledger_agrees(candidate, tmp_path):
    found = call_json("submit", candidate, "--tier", TINY)
    assert found["accepted"] and found["time"]["ratio"] < found["time"]["bound"] < 1
    assert found["value"] == pytest.approx(found["time"]["bound"])
    assert (found["claim"], found["horizon"]) == (None, None)
    replayed = call("replay", found["ledger"])
    assert replayed.returncode == 0
    assert "of the start's time" in replayed.stdout or f"{found['recovered']:.4f}" in replayed.stdout


def test_a_slower_program_is_rejected(tmp_path):
    folder = tmp_path / "slow"
    call("new", folder, "--tier", TINY)
    source = (folder / "train.py").read_text()
    (folder / "train.py").write_text("import time\n" + source.replace("speedrun.save", "time.sleep(3)\nspeedrun.save"))
    done = call("submit", folder, "--tier", TINY)
    assert done.returncode == 1
    assert "not show that it is faster" in done.stdout


def test_this_host_can_be_timed(monkeypatch, tmp_path):
    folder = {"NANOGPT_ENV_STATE": str(tmp_path)}
    found = call_json("tiers", "time", TINY, "--sessions", "2", env=folder)
    assert math.exp(found["log_ratios"]["fast"]) < 0.8
    assert found["pairs"] == 6
    assert "times from this host" in call("tiers", "show", TINY, env=folder).stdout
    monkeypatch.setenv("NANOGPT_ENV_STATE", str(tmp_path))
    assert json.loads(host_timing_path("tiny-wallclock").read_text())["fingerprint"] == TIER.fingerprint()
    refused = call("tiers", "time", "nano-steps")
    assert refused.returncode == 2
    assert "steps track" in refused.stderr


def test_an_interrupted_submission_leaves_nothing(candidate):
    process = subprocess.Popen(
        [COMMAND, "submit", candidate, "--tier", str(TINY)],
        stderr=subprocess.PIPE,
        env=dict(os.environ),
        text=True,
        # a shell's background job, as the test session may be, hands "ignore SIGINT" down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    line = process.stderr.readline()
    assert "rerun 1 (warm-up" in line
    started = descendants(process.pid)
    assert len(started) >= 3
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "nothing is left running" in errors
    assert left_after(started, 5) == []
    time.sleep(0.1)
    assert call_json("doctor", "--no-check")["slots"] == []

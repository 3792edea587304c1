"""Whole episodes on tests/tiny-steps: sandbox, training, verification, and what is left when they are cut short."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY
from processes import descendants, left_after, of_this_process
from test_cli import COMMAND, call, call_json

from nanogpt_env import Cancel, Poll, ReadFile, Run, Speedrun, Stop, Submit, WriteFile
from nanogpt_env.ledger import read_ledger
from nanogpt_env.replay import replay
from nanogpt_env.tiers import load_tier

TIER = load_tier(TINY)
FAST = TIER.records["fast"]
MEASURED = TIER.measured.records["fast"]
CLAIM = MEASURED.claim or FAST.horizon

# `nanogpt-env`, but it says when a run or rerun is under way
TOLD = """
import sys
from nanogpt_env import cli, display

class Told(display.RunProgress):
    def __call__(self, what, handle):
        super().__call__(what, handle)
        progress = handle.progress()
        if progress and progress.done > 2:
            print("training", flush=True)

display.RunProgress = Told
cli.main()
"""


def test_an_episode_from_the_start_record_to_beyond_it(tmp_path):
    before = of_this_process()
    env = Speedrun(TINY, state_dir=tmp_path)
    env.reset()
    env.step(WriteFile(path="optimizer.py", text=FAST.sources["optimizer.py"]))

    observation, reward, _, _, info = env.step(Run(horizon=FAST.horizon))
    assert info["run"]["exit_reason"] == "completed", observation["text"]
    assert info["run"]["sandbox"]["trusted"] is True
    assert info["run"]["val_losses"]["val_public"] < TIER.table.training.target
    assert info["budget"]["device_seconds"]["spent"] == info["run"]["device_seconds"]
    assert info["budget"]["tokens"]["spent"] == FAST.horizon * TIER.tokens_per_step()
    assert reward == 0

    # stopped well before the target: verification must not believe it
    overclaim = round(0.7 * MEASURED.steps_mean)
    _, reward, _, _, info = env.step(Submit(claim=overclaim, horizon=FAST.horizon))
    assert (info["verdict"]["accepted"], reward) == (False, 0)
    assert info["verdict"]["trusted"] is True

    _, reward, _, _, info = env.step(Submit(claim=CLAIM, horizon=FAST.horizon))
    assert info["verdict"]["accepted"] is True
    assert info["verdict"]["trusted"] is True
    start, anchor = TIER.value_of("slow"), TIER.value_of("fast")
    assert reward == pytest.approx((start - CLAIM) / (start - anchor))
    assert 0.8 < reward < 1
    assert info["verification_device_seconds"] > 1

    # a run that is not waited for, cancelled on the way
    handle = env.step(Run(horizon=200, wait=False))[4]["run"]["handle"]
    assert env.step(Poll(handle=handle))[4]["run"]["done"] is False
    assert env.step(Cancel(handle=handle))[4]["run"]["exit_reason"] == "cancelled"
    assert env.step(ReadFile())[4]["running"] == []

    env.step(Stop())
    started = of_this_process() - before
    assert started  # the warm trainer
    env.close()
    assert left_after(started, 10) == []
    found = replay(env.episode.ledger.path)
    assert found.differences == []
    assert found.total_reward == pytest.approx(reward)


def test_a_rule_that_breaks_is_an_observation(tmp_path):
    env = Speedrun(TINY, state_dir=tmp_path)
    env.reset()
    env.step(
        WriteFile(path="optimizer.py", text="def configure(params, horizon):\n    print('here')\n    return 1 / 0\n")
    )
    observation, reward, _, _, info = env.step(Run(horizon=50))
    assert info["run"]["exit_reason"] == "candidate_error"
    assert "ZeroDivisionError" in observation["text"] and "| here" in observation["text"]
    assert info["budget"]["runs"]["spent"] == 1
    _, reward, _, _, info = env.step(Submit(claim=50, horizon=50))
    assert (info["verdict"]["accepted"], info["verdict"]["n"], reward) == (False, 1, 0)
    env.close()


@pytest.fixture
def training(tmp_path):
    """Starts the command line tool and waits until it trains."""
    folder = tmp_path / "candidate"
    folder.mkdir()
    (folder / "optimizer.py").write_text(FAST.sources["optimizer.py"])
    started = []

    def start(command, *options):
        arguments = [command, str(folder), "--tier", str(TINY), "--horizon", "200", *options]
        process = subprocess.Popen(
            [sys.executable, "-c", TOLD, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a shell's background job, as the test session may be, hands "ignore SIGINT" down
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        assert process.stdout.readline() == "training\n", process.communicate()[1]
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "arguments"), [(signal.SIGINT, ["run"]), (signal.SIGTERM, ["submit", "--claim", "200"])]
)
def test_an_interrupt_ends_everything_that_was_started(training, number, arguments):
    process = training(*arguments)
    processes = descendants(process.pid)
    assert len(processes) >= 3  # trainer, bubblewrap, rule
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in output + errors
    assert left_after(processes, 0) == []


@pytest.mark.parametrize("arguments", [["run"]])
def test_nothing_outlives_a_killed_command(training, arguments):
    process = training(*arguments)
    processes = descendants(process.pid)
    assert len(processes) >= 3
    process.kill()
    assert left_after(processes, 10) == []


def interrupted(folder, *arguments):
    """`nanogpt-env` interrupted while it trains: what it told."""
    process = subprocess.Popen(
        [COMMAND, *map(str, arguments), "--tier", TINY, "--output", folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not any('"reserve"' in path.read_text() for path in folder.glob("*/ledger.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    processes = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output + errors, errors
    assert left_after(processes, 10) == []
    return errors


def test_an_interrupted_agent_can_go_on(tmp_path):
    errors = interrupted(tmp_path, "play", "--agent", "greedy", "--budget", "runs=3")
    folder = errors.split("--resume ")[1].splitlines()[0]
    done = call(
        "play", "--agent", "greedy", "--tier", TINY, "--output", tmp_path, "--resume", folder, "--set", "seed=1"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kinds = [line["kind"] for line in read_ledger(Path(folder) / "ledger.jsonl")[0]]
    assert kinds.count("resume") == kinds.count("end") == 1


def test_an_interrupted_comparison_keeps_what_has_ended(tmp_path):
    options = ["--agents", "greedy,random", "--episodes", "1", "--at-once", "2", "--budget", "runs=3"]
    interrupted(tmp_path, "compare", *options)
    assert not (tmp_path / "episodes.jsonl").exists()
    found = call_json("compare", *options, "--tier", TINY, "--output", tmp_path)
    assert [row["episodes"] for row in found["agents"]] == [1, 1]

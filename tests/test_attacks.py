"""The attack suite: enough cases, each a real attack, and none of a selection gets through."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanogpt_env import attacks, content
from nanogpt_env.attacks.cases import RESOURCES, Measured, load_case
from nanogpt_env.attacks.suite import judge
from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.trap import EFFECTS, Trap, validation_files

CASES = {case.name: case for case in attacks.load_cases()}
HOSTILE = [name for name, case in CASES.items() if not case.honest]
HONEST = [name for name, case in CASES.items() if case.honest]
FIGURE = re.compile(r"\d+\.?\d*")
# the naive scorer would be asked here too, but what these do to a machine is better done elsewhere: --naive
SHORT = [name for name, case in CASES.items() if case.track != "submissions"]
FAST = [name for name in SHORT if name in HOSTILE][::10]
SUBMISSION = "submissions/g50_leaves_when_unlucky"
THREATS = re.compile(r"[A-J]\d+")
ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def suite(folder, sandbox, naive=False):
    corpus = content.content_root() / "gpu_backend" / "corpora"
    backend = LocalBackend(sandbox, warm=True)
    with Trap(validation_files(corpus)) as trap, contextlib.closing(backend):
        yield attacks.Suite(backend, trap, folder, naive)


@pytest.fixture(scope="module")
def in_bubblewrap(tmp_path_factory):
    with suite(tmp_path_factory.mktemp("attacks"), "bubblewrap", naive=True) as made:
        yield made


@pytest.fixture(scope="module")
def in_containers(docker_engine, tmp_path_factory):
    with suite(tmp_path_factory.mktemp("attacks"), "docker") as made:
        yield made


@pytest.fixture(scope="module")
def under_landlock(tmp_path_factory):
    with suite(tmp_path_factory.mktemp("attacks"), "landlock") as made:
        yield made


def test_there_are_enough_of_both_kinds():
    assert len(HOSTILE) >= 60 and len(HONEST) >= 10
    assert {CASES[name].track for name in HOSTILE} == {"steps", "wallclock", "free", "submissions", "actions"}


@pytest.mark.parametrize("name", CASES)
def test_a_case_says_what_it_is(name):
    case = CASES[name]
    assert all(THREATS.fullmatch(threat) for threat in case.threats) and bool(case.threats) != case.honest
    assert case.honest or case.gains in {"score", "left", "accepted", "crash", *EFFECTS, *RESOURCES}
    assert case.idea.endswith(".") and len(case.idea) < 120


@pytest.mark.parametrize("name", [*FAST, *(name for name in SHORT if name in HONEST)])
def test_none_gets_through_and_all_fool_the_naive_scorer(in_bubblewrap, name):
    outcome = in_bubblewrap.run(CASES[name])
    assert outcome.verdict in (("honest",) if name in HONEST else ("caught", "no effect")), outcome
    assert name in HONEST or outcome.naive, "this is no attack"


def test_a_claim_that_is_not_deserved_is_refused_each_time(in_bubblewrap, monkeypatch):
    monkeypatch.setattr(in_bubblewrap, "ask_naive", False)
    monkeypatch.setattr(in_bubblewrap.naive, "asked", False)
    assert in_bubblewrap.run(CASES[SUBMISSION]).verdict == "caught"


def test_what_this_host_does_not_have_is_not_tried(in_bubblewrap, monkeypatch):
    monkeypatch.setattr(in_bubblewrap.trap, "missing", {"IPv6"})
    outcome = in_bubblewrap.run(CASES["steps/f43_connects_by_ipv6"])
    assert outcome.verdict == "not applicable" and "IPv6" in outcome.detail


@pytest.mark.parametrize("bounded", attacks.load_bounded(), ids=lambda bounded: bounded.name)
def test_a_bound_is_what_was_measured(bounded):
    results = json.loads((ROOT / "benchmarks" / "results" / bounded.results).read_text())
    told = FIGURE.findall(bounded.gain)
    for path in bounded.figures:
        value = results
        for key in path:
            value = value[int(key) if isinstance(value, list) else key]
        assert any(abs(abs(value) - float(t)) <= 0.5 * 10.0 ** -len(t.partition(".")[2]) + 1e-9 for t in told), path
    assert results["command"] == bounded.command


@pytest.mark.parametrize("name", [n for n in FAST if CASES[n].track == "steps"][::2] + HONEST[:1])
def test_none_gets_through_in_containers(in_containers, name):
    assert in_containers.run(CASES[name]).verdict in (("honest",) if name in HONEST else ("caught", "no effect"))


@pytest.mark.parametrize("name", [n for n in FAST if CASES[n].track == "steps"][1::2] + HONEST[:1])
def test_none_gets_through_under_landlock(under_landlock, name):
    assert under_landlock.run(CASES[name]).verdict in (("honest",) if name in HONEST else ("caught", "no effect"))


def test_what_gets_through_is_seen(tmp_path):
    """A test of the tests: without a sandbox the same cases are told from harmless ones."""
    with suite(tmp_path, "plain") as made:
        for name in ("steps/f43_connects", "steps/f46_reads_a_neighbours_file", "steps/f38_signals_others"):
            assert made.run(CASES[name]).verdict == "PASSED THROUGH", name
        assert made.run(CASES["steps/honest_talks"]).verdict == "honest"


@pytest.mark.parametrize(
    ("loss", "seconds", "reason", "verdict"),
    [
        (4.0, 1.0, "completed", "no effect"),
        (3.95, 1.0, "completed", "no effect"),
        (3.8, 1.0, "completed", "PASSED THROUGH"),
        (3.8, 2.0, "completed", "no effect"),
        (4.0, 0.5, "completed", "PASSED THROUGH"),
        (4.2, 0.5, "completed", "no effect"),
        (3.0, 0.1, "candidate_error", "caught"),
    ],
)
def test_a_gain_is_a_better_loss_or_the_same_sooner(loss, seconds, reason, verdict):
    case = CASES["wallclock/a01_prints_at_exit"]
    control = Measured(loss=4.0, seconds=1.0)
    assert judge(case, Measured(loss=loss, seconds=seconds, exit_reason=reason), control)[0] == verdict


def test_a_file_without_settings_is_refused(tmp_path):
    (tmp_path / "x.py").write_text("import torch\n")
    with pytest.raises(ValueError, match="does not begin with an attack block"):
        load_case(tmp_path / "x.py")


def test_the_trap_finds_nothing_where_nothing_was_done(tmp_path):
    with Trap([]) as trap:
        assert trap.effects("") == {} and trap.left() == [] and trap.written_bytes() == 0
        assert "NANOGPT_ENV_TRAP" in os.environ
    assert "NANOGPT_ENV_TRAP" not in os.environ and not trap.folder.exists()


@pytest.mark.parametrize(("told", "is_it"), [("{}", True), ("/usr/{}", False)], ids=["itself", "a path"])
def test_processes_are_known_by_an_argument(told, is_it):
    """A sandbox may be told to show the file that a probe of another session has just left there."""
    with Trap([]) as trap:
        program = "import time; print(flush=True); time.sleep(60)"
        command = [sys.executable, "-c", program, told.format(trap.token)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout and process.stdout.readline()
            assert trap.left() == [process.pid] * is_it
            trap.clean()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2.0 if is_it else 0.2)
            assert (process.poll() is not None) == is_it
            process.kill()

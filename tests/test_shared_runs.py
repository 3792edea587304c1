"""Identical runs are trained once on a host; runs wait for cores."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import TINY
from fakes import LOST, FakeBackend, ran

from nanogpt_env import Run, Speedrun
from nanogpt_env.backends import shared
from nanogpt_env.backends.queued import Queued
from nanogpt_env.backends.shared import Shared, host_secret
from nanogpt_env.errors import BackendError
from nanogpt_env.slots import Slots
from nanogpt_env.tiers import load_tier
from nanogpt_env.types import Plan

TIER = load_tier(TINY)


def job(steps=20, seed="agent/1", source="x = 1", **limits):
    made = TIER.job({"optimizer.py": source}, Plan(steps=steps, horizon=80), seed, ("val_public",))
    return made.model_copy(update={"limits": made.limits.model_copy(update=limits)})


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPT_ENV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NANOGPT_ENV_STATE", str(tmp_path / "state"))


def backend(script=lambda job, number: 4.5, kind="auto", **options):
    return Shared(FakeBackend(script, **options), lambda: kind)


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


# --- sharing ---


def test_an_identical_run_is_trained_once():
    one, two = backend(), backend()
    first, second = one.start(job(), share=True).result(5), two.start(job(), share=True).result(5)
    assert (len(one.inner.runs), len(two.inner.runs)) == (1, 0)
    assert (first.shared, second.shared) == (False, True)
    assert second.model_copy(update={"shared": False}) == first


@pytest.mark.parametrize(
    "other",
    [job(steps=21), job(seed="agent/2"), job(source="x = 2"), job(setup_s=5.0)],
    ids=["steps", "seed", "program", "limits"],
)
def test_another_run_is_trained_itself(other):
    one = backend()
    for wanted in (job(), other):
        assert not one.start(wanted, share=True).result(5).shared
    assert len(one.inner.runs) == 2


def test_deadline_and_cores_make_no_other_run():
    one = backend()
    one.start(job(), share=True).result(5)
    assert one.start(job(deadline_s=55.0).model_copy(update={"cores": (1,)}), share=True).result(5).shared


def test_a_result_that_took_longer_than_allowed_is_of_no_use():
    one = backend(lambda job, number: ran(job, 4.5, seconds=30.0))
    one.start(job(), share=True).result(5)
    assert not one.start(job(deadline_s=20.0), share=True).result(5).shared


def test_results_of_another_kind_of_sandbox_are_not_shared():
    backend(kind="plain").start(job(), share=True).result(5)
    assert not backend(kind="auto").start(job(), share=True).result(5).shared


def test_results_of_another_trainer_are_not_shared(monkeypatch):
    backend().start(job(), share=True).result(5)
    monkeypatch.setattr(shared, "_trainer", lambda: b"another")
    assert not backend().start(job(), share=True).result(5).shared


def test_only_what_asks_for_it_is_shared():
    one = backend()
    for _ in range(2):
        assert not one.start(job()).result(5).shared
    assert len(one.inner.runs) == 2


def test_failures_are_not_shared():
    outcomes = iter([ran(job(), 9.0, reason="candidate_memory"), LOST, 4.5])
    one = backend(lambda job, number: next(outcomes))
    assert one.start(job(), share=True).result(5).exit_reason == "candidate_memory"
    with pytest.raises(BackendError, match="node lost"):
        one.start(job(), share=True).result(5)
    assert one.start(job(), share=True).result(5).completed


def test_a_damaged_result_is_trained_again(tmp_path):
    one = backend()
    one.start(job(), share=True).result(5)
    (path,) = (tmp_path / "cache" / "runs").glob("*.json")
    path.write_text(path.read_text()[:-20])
    assert not one.start(job(), share=True).result(5).shared
    assert one.start(job(), share=True).result(5).shared


class Slow(FakeBackend):
    """Ends each run when it is told to."""

    def start(self, job, share=False):
        run = super().start(job)
        gate = threading.Event()
        run.release, result = gate.set, run.result

        def wait(timeout=None):
            gate.wait()
            return result(timeout)

        run.result, run.done = wait, gate.is_set
        run.cancel = gate.set
        return run


def test_a_run_that_is_under_way_is_waited_for():
    one, two = Shared(Slow(), lambda: "auto"), backend()
    first = one.start(job(), share=True)
    until(lambda: one.inner.runs)
    second = two.start(job(), share=True)
    time.sleep(0.3)
    assert not second.done()
    one.inner.runs[0].release()
    assert first.result(5).shared is False
    assert second.result(5).shared is True
    assert two.inner.runs == []


def test_a_wait_for_somebody_elses_run_can_be_cancelled():
    one, two = Shared(Slow(), lambda: "auto"), backend()
    one.start(job(), share=True)
    until(lambda: one.inner.runs)
    second = two.start(job(), share=True)
    second.cancel()
    result = second.result(5)
    assert (result.exit_reason, result.device_seconds) == ("cancelled", 0)
    one.close()


def test_when_the_trainer_of_a_shared_run_dies_the_next_one_trains():
    code = (
        "import sys, test_shared_runs as t\n"
        "b = t.Shared(t.Slow(), lambda: 'auto')\nb.start(t.job(), share=True)\n"
        "t.until(lambda: b.inner.runs)\nprint('started', flush=True)\nt.time.sleep(60)\n"
    )
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline() == "started\n"
    two = backend()
    run = two.start(job(), share=True)
    time.sleep(0.5)
    assert not run.done()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert run.result(10).completed
    assert len(two.inner.runs) == 1


def test_no_more_results_are_kept_than_wanted(monkeypatch, tmp_path):
    monkeypatch.setattr(shared, "KEEP", 3)
    one = backend()
    for seed in range(6):
        one.start(job(seed=f"agent/{seed}"), share=True).result(5)
    assert len(list((tmp_path / "cache" / "runs").glob("*.json"))) <= 4  # one more until the next start
    assert one.start(job(seed="agent/5"), share=True).result(5).shared
    assert not one.start(job(seed="agent/0"), share=True).result(5).shared


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOGPT_ENV_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BackendError, match="NANOGPT_ENV_CACHE"):
        backend().start(job(), share=True)


def test_a_missing_corpus_is_a_failure_of_ours():
    with pytest.raises(BackendError, match="nowhere"):
        backend().start(job().model_copy(update={"corpus": "/nowhere"}), share=True)


# --- an episode's seeds ---


def episode(tmp_path, **options):
    env = Speedrun(TINY, backend=backend(**options), state_dir=tmp_path / "ledgers")
    env.reset()
    return env


def runs(env, count, **fields):
    return [env.step(Run(horizon=40, **fields))[4]["run"] for _ in range(count)]


def test_episodes_share_runs_and_each_is_charged(tmp_path):
    one, two = episode(tmp_path), episode(tmp_path)
    first, second = runs(one, 2), runs(two, 2)
    assert [r["seed"] for r in first] == [r["seed"] for r in second]
    assert len({r["seed"] for r in first}) == 2
    assert [r["shared"] for r in first + second] == [False, False, True, True]
    for meter in ("device_seconds", "flops", "tokens", "runs"):
        spent = one.episode.budget.spent(meter)
        assert 0 < spent == two.episode.budget.spent(meter)
    assert "identical run" in two.step({"type": "poll", "handle": "run-1"})[0]["text"]


def test_verification_is_never_shared(tmp_path):
    for _ in range(2):
        env = episode(tmp_path)
        env.step({"type": "submit", "claim": 60, "horizon": 60})
        evidence = json.loads(next((env.episode.folder / "evidence").iterdir()).read_text())
        assert len(env._backend.inner.runs) >= len(evidence["reruns"]) > 2


def test_the_seeds_are_the_hosts_secret(tmp_path, monkeypatch):
    seeds = runs(episode(tmp_path), 1)[0]["seed"]
    assert host_secret() == host_secret()
    assert (tmp_path / "state" / "seed-secret").stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("NANOGPT_ENV_STATE", str(tmp_path / "other host"))
    assert runs(episode(tmp_path), 1)[0]["seed"] != seeds


# --- cores ---


def queued(inner=None, owner="one", cores=(0, 1)):
    made = Queued(inner or FakeBackend(), owner)
    made.slots = Slots(owner, cores)
    return made


def test_a_run_has_a_core_and_gives_it_back():
    q = queued()
    assert q.start(job()).result(5).completed
    (started,) = q.inner.jobs
    assert len(started.cores) == 1
    until(lambda: q.slots.status() == [])


def test_runs_beyond_the_cores_wait_and_environments_take_turns():
    slow = Slow()
    one, two = queued(slow, "one"), queued(slow, "two")
    many = [one.start(job(seed=f"{i}")) for i in range(4)]
    until(lambda: len(slow.runs) == 2)
    other = two.start(job(seed="other"))
    time.sleep(0.3)
    assert len(slow.runs) == 2
    slow.runs[0].release()
    until(lambda: len(slow.runs) == 3)
    assert slow.runs[2].job.seed == "other"  # who has fewest goes first
    for i in range(5):
        until(lambda i=i: len(slow.runs) > i)
        slow.runs[i].release()
    assert all(run.result(5).completed for run in (*many, other))


def test_a_waiting_run_can_be_cancelled_at_no_cost():
    slow = Slow()
    q = queued(slow, cores=(0,))
    first = q.start(job())
    until(lambda: slow.runs)
    second = q.start(job(seed="b"))
    second.cancel()
    result = second.result(5)
    assert (result.exit_reason, result.device_seconds, result.tokens) == ("cancelled", 0, 0)
    assert len(slow.runs) == 1
    q.close()
    assert first.done()


def test_a_timed_session_waits_for_others_and_keeps_them_out():
    slow = Slow()
    one, two = queued(slow, "one"), queued(slow, "two")
    running = one.start(job())
    until(lambda: slow.runs)
    waited, entered, leave = threading.Event(), threading.Event(), threading.Event()

    def session():
        with two.exclusive(waited.set):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=session)
    thread.start()
    assert waited.wait(5)
    assert not entered.is_set()
    slow.runs[0].release()
    assert running.result(5).completed
    assert entered.wait(5)
    late = one.start(job(seed="late"))
    time.sleep(0.3)
    assert len(slow.runs) == 1
    leave.set()
    thread.join(5)
    until(lambda: len(slow.runs) == 2)
    slow.runs[1].release()
    assert late.result(5).completed


def test_in_a_session_its_own_runs_start_at_once_all_on_one_core():
    q = queued(cores=(0, 1))
    with q.exclusive():
        for i in range(3):
            assert q.start(job(seed=str(i))).result(5).completed
        assert {j.cores for j in q.inner.jobs} == {(1,)}
        assert [row["exclusive"] for row in q.slots.status()] == [True, True]
    assert q.slots.status() == []


def test_an_interrupted_wait_for_a_session_leaves_nothing():
    slow = Slow()
    one, two = queued(slow, "one"), queued(slow, "two")
    one.start(job())
    until(lambda: slow.runs)

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), two.exclusive(interrupt):
        raise AssertionError("it was let in")
    slow.runs[0].release()
    until(lambda: one.slots.status() == [])


def test_closing_cancels_what_waits_and_what_runs():
    slow = Slow()
    q = queued(slow, cores=(0,))
    handles = [q.start(job(seed=str(i))) for i in range(3)]
    until(lambda: slow.runs)
    q.close()
    until(lambda: all(h.done() for h in handles))
    assert len(slow.runs) == 1
    assert slow.closed == 1

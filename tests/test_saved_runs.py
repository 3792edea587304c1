"""Runs that are saved now and then, killed, and gone on with: at the same result, to the bit."""

import contextlib
import os
import signal
import time

import pytest
from processes import descendants
from rules import SGD, rule_job

from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.backends.queued import Queued
from nanogpt_env.content import cache_dir
from nanogpt_env.errors import TrainerKilled

# state in the optimizers (one attribute that torch's own state_dict would leave out), in the module, in generators
STATEFUL = """
import copy, random, time, torch
steps, ema = 0, {}
random.seed(0)
class Momentum(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.seen = []
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.setdefault(p, {})
                state["m"] = 0.9 * state.get("m", 0) + p.grad
                p.add_(state["m"], alpha=-group["lr"] * (1 + 0.01 * len(self.seen)))
        self.seen.append(group["lr"])
def init(params):
    for p in params.values():
        p.normal_(0.0, 0.02)
def configure(params, horizon):
    matrices = list(params.values())
    return [Momentum(matrices[1:]), torch.optim.AdamW(matrices[:1], lr=0.01)]
def schedule(step, horizon, optimizers):
    global steps
    steps += 1
    assert steps == step + 1
    time.sleep(SLEEP)
    optimizers[0].param_groups[0]["lr"] = 0.1 + 0.01 * torch.rand(()).item() + 0.01 * random.random()
def readout(params, optimizers):
    for name, p in params.items():
        ema[name] = 0.5 * ema.get(name, p.detach()) + 0.5 * p.detach()
    return ema
"""
STEPS, EVERY = 24, 5


def job_of(tier, source, **changes):
    job = rule_job(tier, source, STEPS)
    return job.model_copy(update={"points": (4, 12, 18), "save_every": EVERY, **changes})


@pytest.fixture
def cold():
    with contextlib.closing(LocalBackend("bubblewrap")) as backend:
        yield backend


def saved_steps():
    return sorted({int(p.stem.split("-")[1]) for p in (cache_dir() / "runs").glob("*/*.safetensors")})


def killed(backend, job, at=2 * EVERY):
    """Kill its trainer when it has saved step `at`."""
    run = backend.start(job)
    until = time.monotonic() + 90
    while at not in saved_steps():
        assert time.monotonic() < until
        assert not run.done(), run.result()
        time.sleep(0.01)
    os.kill(run._process.pid, signal.SIGKILL)
    with pytest.raises(TrainerKilled):
        run.result(30)


def same(a, b):
    assert a.completed and b.completed, (a.detail, a.log, b.detail, b.log)
    for field in ("train_losses", "val_points", "val_losses", "steps", "tokens", "flops"):
        assert getattr(a, field) == getattr(b, field), field


@pytest.mark.parametrize("changes", [{}, {"shards": 2, "ranks": 2}, {"exchange": "cpu"}], ids=["one", "ranks", "copy"])
def test_a_killed_run_goes_on_at_the_same_result(cold, tier, changes):
    whole = cold.start(job_of(tier, STATEFUL.replace("SLEEP", "0"), **changes, save_every=0)).result(120)
    job = job_of(tier, STATEFUL.replace("SLEEP", "0.1"), **changes)
    killed(cold, job)
    resumed = cold.start(job).result(120)
    same(whole, resumed)
    assert resumed.hardware["resumed_at_step"] in (2 * EVERY, 3 * EVERY)
    assert "resumed_at_step" not in whole.hardware
    assert saved_steps() == []  # nothing is kept of a run that ended
    # what was used before counts, too
    assert resumed.device_seconds > resumed.train_seconds > 0.1 * STEPS


def test_a_backend_with_turns_goes_on_by_itself(tier):
    source = STATEFUL.replace("SLEEP", "0.1")
    with contextlib.closing(Queued(LocalBackend("bubblewrap"), "test")) as backend:
        before = descendants(os.getpid())
        run = backend.start(job_of(tier, source))
        until = time.monotonic() + 90
        while not saved_steps():
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(run._run._process.pid, signal.SIGKILL)
        resumed = run.result(120)
        assert resumed.hardware["resumed_at_step"] >= EVERY
        same(backend.start(job_of(tier, source, save_every=0)).result(120), resumed)
        assert descendants(os.getpid()) <= before


def test_another_job_does_not_go_on_with_it(cold, tier):
    job = job_of(tier, STATEFUL.replace("SLEEP", "0.1"))
    killed(cold, job, EVERY)
    other = cold.start(job.model_copy(update={"seed": "2"})).result(120)
    assert "resumed_at_step" not in other.hardware
    assert cold.start(job).result(120).hardware["resumed_at_step"] >= EVERY


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("keep = lambda: 0\nstate = [keep]\n" + SGD, "cannot be kept"),
        ("state = torch.zeros(1 << 22)\n" + SGD, "too many to be kept"),
    ],
)
def test_what_cannot_be_saved_runs_on_and_says_so(cold, tier, source, told):
    source = "import torch\n" + source
    result = cold.start(job_of(tier, source)).result(120)
    assert told in result.log
    same(cold.start(job_of(tier, source, save_every=0)).result(120), result)
    assert saved_steps() == []


def test_a_damaged_file_is_no_reason_to_fail(cold, tier):
    job = job_of(tier, STATEFUL.replace("SLEEP", "0.1"))
    killed(cold, job)
    for path in (cache_dir() / "runs").glob("*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1000])
    result = cold.start(job).result(120)
    assert result.completed
    assert "resumed_at_step" not in result.hardware


def test_the_bytes_are_never_unpickled_by_the_trainer(cold, tier, tmp_path):
    """They are the candidate's, and only its next process opens them."""
    source = """
import os, torch
class Trap:
    def __reduce__(self):
        return (print, ("opened by", ))
trap = Trap()
""" + STATEFUL.replace("SLEEP", "0.1")
    job = job_of(tier, source)
    killed(cold, job)
    result = cold.start(job).result(120)
    assert result.completed
    assert result.log.count("opened by") == 1  # in the sandbox's output, not in ours


@pytest.mark.parametrize("size", [1 << 31, 60 << 20])
def test_what_a_rule_says_of_its_state_is_not_believed(cold, tier, size):
    source = f"""
import host
send = host.send
host.send = lambda control, command, *arguments: send(control, command, {size})
{SGD}"""
    result = cold.start(job_of(tier, source)).result(120)
    assert result.exit_reason == "candidate_protocol"
    assert "for which there is no room" in result.detail

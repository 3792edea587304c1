"""Several trainers that share a run: the same result as one, and one end for all."""

import contextlib
import os
import re
import signal
import threading
import time

import pytest
from processes import descendants, left_after
from rules import SGD, rule_job

from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.errors import BackendError

ADAM = """
import torch
def configure(params, horizon):
    print(len(params), "tensors:", *params)
    return torch.optim.Adam(params.values(), lr=0.01)
"""
NOISY = """
import torch
def init(params):
    for p in params.values():
        p.normal_(0.0, 0.02)
def configure(params, horizon):
    return torch.optim.SGD(params.values(), lr=0.1, momentum=0.9)
def schedule(step, horizon, optimizers):
    for group in optimizers[0].param_groups:
        group["lr"] = 0.1 + 0.01 * torch.rand(()).item()
def readout(params, optimizers):
    return {name: p + 1e-3 * torch.randn(p.shape) for name, p in params.items()}
"""


@pytest.fixture(scope="module")
def cold():
    with contextlib.closing(LocalBackend("bubblewrap")) as backend:
        yield backend


def run(backend, tier, source, steps=6, wait=True, **changes):
    job = rule_job(tier, source, steps, shards=("val_public",))
    handle = backend.start(job.model_copy(update=changes))
    return handle.result(120) if wait else handle


def same(a, b, tolerance=1e-5):
    assert a.completed and b.completed, (a.detail, a.log, b.detail, b.log)
    assert a.train_losses == pytest.approx(b.train_losses, abs=tolerance)
    assert a.val_losses["val_public"] == pytest.approx(b.val_losses["val_public"], abs=tolerance)
    assert [loss for _, loss in a.val_points] == pytest.approx([loss for _, loss in b.val_points], abs=tolerance)


@pytest.mark.parametrize("source", [ADAM, NOISY], ids=["adam", "noisy"])
def test_two_and_four_ranks_give_what_one_gives(cold, tier, source):
    alone = run(cold, tier, source, shards=4)
    for ranks in (2, 4):
        together = run(cold, tier, source, ranks=ranks, shards=4)
        same(alone, together)
        assert (together.tokens, together.hardware["devices"]) == (alone.tokens, ranks)
        assert together.sandbox.trusted


def test_what_updates_each_tensor_by_itself_does_not_care_for_shards(cold, tier):
    same(run(cold, tier, ADAM), run(cold, tier, ADAM, shards=3))


def test_a_rule_sees_its_shards_only_and_all_are_seen(cold, tier):
    whole, parts = run(cold, tier, ADAM), run(cold, tier, ADAM, shards=3)
    seen = [line.split(": ")[1].split() for line in re.findall(r"^\d+ tensors: .*", parts.log, re.MULTILINE)]
    names = re.findall(r"tensors: (.*)", whole.log)[0].split()
    assert len(seen) == 3
    assert sorted(name for shard in seen for name in shard) == sorted(names)
    first = run(cold, tier, ADAM, ranks=3, shards=3, batch_size=9)  # the log is the first rank's
    assert [line.split() for line in re.findall(r"tensors: (.*)", first.log)] == seen[:1]


def test_accumulated_gradients_are_those_of_the_batch(cold, tier):
    whole = run(cold, tier, ADAM)
    for rows in (1, 3, 8, 100):
        same(whole, run(cold, tier, ADAM, micro_batch=rows))
    same(whole, run(cold, tier, ADAM, ranks=2, shards=2, micro_batch=2))


def test_a_copy_on_another_device_gives_the_same_to_the_bit(cold, tier):
    """As for a GPU, with the CPU in its place: what is exchanged goes through shared memory."""
    for source in (ADAM, NOISY):
        ours, theirs = run(cold, tier, source), run(cold, tier, source, exchange="cpu")
        assert ours.train_losses == theirs.train_losses
        assert ours.val_losses == theirs.val_losses


def test_bf16_is_near(cold, tier):
    exact, short = run(cold, tier, ADAM), run(cold, tier, ADAM, numbers="bf16")
    same(exact, short, tolerance=0.05)
    assert exact.train_losses != short.train_losses


ONE_FAILS = """
import os, time, torch
def configure(params, horizon):
    global name
    name = next(iter(params))
    return torch.optim.SGD(params.values(), lr=0.1)
def schedule(step, horizon, optimizers):
    if step == 2 and not name.startswith("embed"):
        {}
"""


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("raise RuntimeError('no')", "candidate_error"),
        ("os._exit(3)", "candidate_exited"),
        ("time.sleep(100)", "candidate_stalled"),
        ("optimizers[0].param_groups[0]['params'][0].data.fill_(float('nan'))", "nonfinite_loss"),
    ],
)
def test_one_that_fails_ends_all(cold, tier, does, reason):
    before = descendants(os.getpid())
    result = run(cold, tier, ONE_FAILS.format(does), ranks=2, shards=2)
    assert result.exit_reason == reason, result.detail
    assert result.steps in (2, 3)
    assert left_after(descendants(os.getpid()) - before, 10) == []


def test_a_readout_on_one_rank_only_counts_for_none(cold, tier):
    hides = "    if 'embed.weight' not in params:\n        del globals()['readout']\n    return"
    sly = SGD.replace("    return", hides)
    sly += "def readout(params, optimizers):\n    return {}\n"
    same(run(cold, tier, SGD, ranks=2, shards=2), run(cold, tier, sly, ranks=2, shards=2))


def test_cancelled(cold, tier):
    before = descendants(os.getpid())
    slow = ADAM + "\nimport time\ndef schedule(step, horizon, optimizers):\n    time.sleep(0.2)\n"
    handle = run(cold, tier, slow, steps=100, ranks=2, shards=2, wait=False)
    wait_for(lambda: handle.progress() is not None)
    handle.cancel()
    assert handle.result(20).exit_reason == "cancelled"
    assert left_after(descendants(os.getpid()) - before, 10) == []


@pytest.mark.parametrize("victim", ["first", "further"])
def test_a_killed_rank_ends_all(cold, tier, victim):
    before = descendants(os.getpid())
    slow = ADAM + "\nimport time\ndef schedule(step, horizon, optimizers):\n    time.sleep(0.2)\n"
    handle = run(cold, tier, slow, steps=100, ranks=2, shards=2, wait=False)
    wait_for(lambda: handle.progress() is not None)
    started = descendants(os.getpid()) - before
    trainers = [pid for pid, _ in started if "trainer.py" in command(pid)]
    killed = [pid for pid in trainers if ("--rank" in command(pid)) == (victim == "further")]
    os.kill(killed[0], signal.SIGKILL)
    if victim == "first":
        with pytest.raises(BackendError, match="exit code -9"):
            handle.result(20)
    else:
        assert handle.result(60).exit_reason == "trainer_error"
    assert left_after(started, 15) == []


def test_two_runs_of_two_ranks_at_once(cold, tier):
    results = []
    threads = [threading.Thread(target=lambda: results.append(run(cold, tier, ADAM, ranks=2, shards=2))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same(*results)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ranks": 3, "shards": 3}, "cannot share 8 rows"),
        ({"ranks": 2}, "and 1 shards evenly"),
        ({"shards": 1000}, "cannot be split into 1000 shards"),
        ({"numbers": "fp8"}, "fp32 or bf16"),
    ],
)
def test_what_cannot_be_shared_is_refused(cold, tier, changes, text):
    with pytest.raises(BackendError, match=text):
        run(cold, tier, ADAM, **changes)


def command(pid):
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read()


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    assert condition()

"""The wallclock track's run: tokens, clock and checkpoint are the trainer's, whatever training code does."""

from __future__ import annotations

import math
import time

import pytest
from processes import left_after, of_this_process

from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.content import cache_dir
from nanogpt_env.types import WallclockJob

TOKENS = 64 * 64 * 8
HONEST = """
import torch, speedrun
from speedrun import GPT, config

torch.manual_seed(0)
model = GPT(config.model)
model.initialize(torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

def step(x, y):
    loss = model(x, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()

for (x, y), _ in zip(speedrun.batches(8, 64), range(2)):
    model(x, y).backward()
optimizer.zero_grad()
speedrun.start()
for i, (x, y) in enumerate(speedrun.batches(8, 64)):
    loss = step(x, y)
print(f"{i + 1} steps, loss {loss:.3f}")
speedrun.save(model.state_dict())
"""


def job_of(tier, source, seed="1", tokens=TOKENS, **limits):
    t = tier.table
    return WallclockJob(
        model=t.model.model_dump(),
        corpus=str(tier.corpus_folder()),
        cache=str(cache_dir()),
        seed=seed,
        limits=tier.limits().model_copy(update={"setup_s": 20.0, **limits}),
        train_shards=t.data.train_shards,
        final_shards=(t.data.public,),
        sources={"train.py": source},
        tokens=tokens,
        max_batch_tokens=4096,
    )


def train(backend, tier, source, **changes):
    return backend.start(job_of(tier, source, **changes)).result(120)


def changed(old, new):
    assert HONEST.count(old) == 1, old
    return HONEST.replace(old, new)


# --- an honest run ---


def test_training_code_trains(backend, tier):
    result = train(backend, tier, HONEST)
    assert result.exit_reason == "completed", result.log
    assert result.tokens == TOKENS
    assert result.steps == TOKENS // 512
    assert result.flops == TOKENS * tier.flops_per_token()
    assert 4 < result.val_losses["val_public"] < math.log(1024) - 0.5
    assert f"{TOKENS // 512} steps" in result.log
    assert 0 < result.train_seconds < result.device_seconds
    assert result.candidate_peak_bytes > 50 << 20
    assert result.sandbox.name == backend.sandbox


def test_the_same_seed_serves_the_same_tokens_and_another_does_not(sealed, tier):
    a, b, c = (train(sealed, tier, HONEST, seed=seed) for seed in ("x", "x", "y"))
    assert a.val_losses == b.val_losses != c.val_losses


def test_shapes_and_orders_are_the_candidates(sealed, tier):
    loop = "for i, (x, y) in enumerate(speedrun.batches(8, 64)):"
    schedule = "for i, (x, y) in enumerate(speedrun.batches(shapes=[(4, 32)] * 5 + [(64, 64)] * 7, order='documents')):"
    result = train(
        sealed, tier, changed(loop, schedule + "\n    assert (x[:, 0] == 0).all() and (x[:, 1:] == y[:, :-1]).all()")
    )
    assert result.exit_reason == "completed", result.log
    assert (result.steps, result.tokens) == (12, 5 * 128 + 7 * 4096)


# --- tokens ---


def test_there_are_no_more_tokens_than_the_cap(sealed, tier):
    greedy = changed("speedrun.save", "assert len(list(speedrun.batches(8, 64))) == 0\nspeedrun.save")
    result = train(sealed, tier, greedy)
    assert (result.exit_reason, result.tokens) == ("completed", TOKENS)


def test_batches_before_the_start_are_noise(sealed, tier):
    """A model trained on them knows nothing of the text."""
    noise = changed("range(2)):\n    model(x, y).backward()\noptimizer.zero_grad()", "range(60)):\n    step(x, y)")
    noise = noise.replace("enumerate(speedrun.batches(8, 64))", "zip(range(1), speedrun.batches(8, 64))")
    noise = noise.replace("loss = step(x, y)", "pass").replace(
        "for i, (x, y) in zip(range(1)", "loss = i = 0\nfor i, (x, y) in zip(range(1)"
    )
    result = train(sealed, tier, noise)
    assert result.exit_reason == "completed", result.log
    assert result.val_losses["val_public"] > math.log(1024) - 0.05


def test_what_was_made_ahead_counts(sealed, tier):
    early = changed("enumerate(speedrun.batches(8, 64))", "zip(range(1), speedrun.batches(8, 64))")
    result = train(sealed, tier, early)
    assert result.exit_reason == "completed", result.log
    assert 512 < result.tokens <= 5 * 512


# --- the clock ---


def test_set_up_is_not_timed_and_what_follows_is(sealed, tier):
    slow_start = train(sealed, tier, changed("speedrun.start()", "import time; time.sleep(2)\nspeedrun.start()"))
    slow_end = train(sealed, tier, changed("speedrun.save", "import time; time.sleep(2)\nspeedrun.save"))
    assert slow_start.device_seconds - slow_start.train_seconds > 2
    assert slow_end.train_seconds > 2


def test_the_candidates_clock_does_not_matter(sealed, tier):
    lie = "import time\ntime.monotonic = time.perf_counter = time.time = lambda: 0.0\n"
    lie += 'print("val_loss:1.0 train_time:1ms")\n' + changed(
        "speedrun.save", "import threading; threading.Event().wait(1)\nspeedrun.save"
    )
    result = train(sealed, tier, lie)
    assert result.exit_reason == "completed", result.log
    assert result.train_seconds > 1
    assert result.val_losses["val_public"] > 4


# --- faults ---

SAVE = "speedrun.save(model.state_dict())"
FAULTS = {
    "ends without a checkpoint": (changed(SAVE, ""), "candidate_error"),
    "raises": (changed("speedrun.start()", "1 / 0"), "candidate_error"),
    "leaves": (changed("speedrun.start()", "import os; os._exit(0)"), "candidate_exited"),
    "never starts": (changed("speedrun.start()", "while True: pass"), "candidate_stalled"),
    "starts and waits": (changed("speedrun.start()", "speedrun.start()\nwhile True: pass"), "candidate_stalled"),
    "stalls": (changed(SAVE, "while True: pass"), "candidate_stalled"),
    "starts twice": (changed("speedrun.start()", "speedrun.start(); speedrun.start()"), "candidate_protocol"),
    "saves untrained": (changed("speedrun.start()", SAVE), "candidate_protocol"),
    "asks for too much": (changed("speedrun.start()", "next(speedrun.batches(1000, 64))"), "candidate_protocol"),
    "asks for too long rows": (changed("speedrun.start()", "next(speedrun.batches(1, 65))"), "candidate_protocol"),
    "sends garbage": (changed("speedrun.start()", "speedrun._control.sendall(b'x' * 64)"), "candidate_protocol"),
    "claims a huge checkpoint": (
        changed(SAVE, "import host; host.send(speedrun._control, host.SAVE, 2**31); input()"),
        "candidate_protocol",
    ),
    "is not finite": (changed(SAVE, "model.head.weight.data[0, 0] = float('nan')\n" + SAVE), "nonfinite_loss"),
    "brings another tensor": (
        changed(SAVE, "speedrun.save({**model.state_dict(), 'more': torch.zeros(1)})"),
        "checkpoint_refused",
    ),
    "eats memory": (changed("speedrun.start()", "x = torch.ones(1 << 33)"), "candidate_memory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_run_with_its_reason(sealed, tier, fault):
    source, reason = FAULTS[fault]
    result = train(sealed, tier, source, setup_s=6.0, stall_s=2.0)
    assert result.exit_reason == reason, (result.detail, result.log)
    assert result.val_losses == {}


def test_the_deadline_holds(sealed, tier):
    source = changed("loss = step(x, y)", "loss = step(x, y); import time; time.sleep(0.2)")
    result = train(sealed, tier, source, deadline_s=4.0)
    assert result.exit_reason == "deadline"
    assert result.device_seconds < 8


def test_a_cancelled_run_leaves_nothing(tier):
    before = of_this_process()
    backend = LocalBackend("bubblewrap")
    slow = changed("loss = step(x, y)", "loss = step(x, y); import time; time.sleep(0.2)")
    run = backend.start(job_of(tier, slow))
    until = time.monotonic() + 60
    while run.progress() is None and time.monotonic() < until:
        time.sleep(0.05)
    started = of_this_process() - before
    run.cancel()
    assert run.result(30).exit_reason == "cancelled"
    backend.close()
    assert len(started) >= 2
    assert left_after(started, 10) == []

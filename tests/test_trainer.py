"""The real trainer on a tiny model: what a run yields, and how every fault of a candidate ends it."""

from __future__ import annotations

import math
import os
import time

import pytest
import torch
from processes import command_lines, left_after, of_this_process
from rules import SGD, rule_job, schedule, train

from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.errors import BackendError
from nanogpt_env.tiers import load_tier


def in_process(tier, source, steps, seed):
    """Losses of the same training with the rule applied in this process, written independently."""
    from trainer import Result, StepsJob
    from training import Training

    job = rule_job(tier, source, steps, seed)
    training = Training(StepsJob(**job.model_dump()), Result(), lambda: False)
    namespace: dict = {}
    exec(source, namespace)
    params = dict(training.model.named_parameters())
    optimizer = namespace["configure"](params, steps)

    class InProcess:
        has_readout = False

        def step(self, step, seconds):
            if "schedule" in namespace:
                namespace["schedule"](step, steps, [optimizer])
            optimizer.step()

        def readout(self):
            return training.flat.params

    training.train_with(InProcess(), lambda: None)
    return training.result.train_losses


# --- what a run yields ---


def test_a_run_yields_its_measurements(backend, tier):
    source = tier.records["fast"].sources["optimizer.py"]
    result = train(backend, tier, source, steps=12, horizon=48)
    assert result.exit_reason == "completed"
    assert len(result.train_losses) == result.steps == 12
    assert result.tokens == 12 * 8 * 64
    assert result.flops == 12 * 8 * 64 * tier.flops_per_token()
    assert result.val_points[-1][0] == 12
    assert 5 < result.val_losses["val_public"] < math.log(1024)
    assert 0 < result.train_seconds < result.device_seconds
    assert result.trainer_peak_bytes > 50 << 20
    assert result.candidate_peak_bytes > 50 << 20
    assert result.sandbox.name == backend.sandbox
    assert result.sandbox.trusted is (backend.sandbox == "bubblewrap")
    assert result.versions["torch"] == torch.__version__
    if not result.sandbox.trusted:
        assert "bubblewrap" in result.sandbox.note


def test_the_same_seed_repeats_the_run_and_another_does_not(sealed, tier):
    source = tier.records["fast"].sources["optimizer.py"]
    a, b, c = (train(sealed, tier, source, steps=6, seed=seed) for seed in ("x", "x", "y"))
    assert a.train_losses == b.train_losses != c.train_losses
    assert a.val_losses == b.val_losses


@pytest.mark.parametrize("name", ["slow", "fast"])
def test_isolated_and_in_process_losses_agree(sealed, tier, name):
    source = tier.records[name].sources["optimizer.py"]
    isolated = train(sealed, tier, source, steps=20, seed="same")
    assert isolated.train_losses == pytest.approx(in_process(tier, source, 20, "same"), abs=1e-6)


def test_flops_agree_with_torch_counting_the_real_model(tier):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from model import GPT, ModelConfig, flops_per_token

    config = ModelConfig(**load_tier("nano-steps", calibrated=False).table.model.model_dump())
    model = GPT(config)
    ids = torch.zeros(2, config.seq_len, dtype=torch.int64)
    # torch has no formula for the fused CPU attention, so count the plain one
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    assert counter.get_total_flops() == 2 * config.seq_len * flops_per_token(config)
    assert tier.flops_per_token() == flops_per_token(ModelConfig(**tier.table.model.model_dump()))


# --- what a candidate can be ---


def test_averaged_weights_are_evaluated_but_not_trained_on(sealed, tier):
    source = SGD + (
        "def readout(params, optimizers):\n    return {name: torch.zeros_like(p) for name, p in params.items()}\n"
    )
    result = train(sealed, tier, source, steps=6)
    assert result.val_losses["val_public"] == pytest.approx(math.log(1024), abs=1e-5)  # zero weights: uniform
    plain = train(sealed, tier, SGD, steps=6)
    assert result.train_losses == plain.train_losses


def test_init_schedule_and_several_optimizers(sealed, tier):
    source = """
import torch
SEEN = []
def init(params):
    for p in params.values():
        p.zero_()
def configure(params, horizon):
    embed = [p for n, p in params.items() if n.startswith("embed")]
    rest = [p for n, p in params.items() if not n.startswith("embed")]
    return [torch.optim.Adam(embed, lr=0.01), torch.optim.SGD(rest, lr=0.0)]
def schedule(step, horizon, optimizers):
    SEEN.append((step, horizon, len(optimizers)))
    if step == 4:
        print(SEEN)
"""
    result = train(sealed, tier, source, steps=5, horizon=7)
    assert result.train_losses == pytest.approx([math.log(1024)] * 5, abs=1e-5)  # head stays zero
    assert result.log.strip() == str([(step, 7, 2) for step in range(5)])


def test_a_rule_may_rebind_data_and_drop_gradients(sealed, tier):
    source = """
import torch
class Rebind(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = p.data - group["lr"] * p.grad
        self.zero_grad(set_to_none=True)
def configure(params, horizon):
    return Rebind(params.values())
"""
    assert train(sealed, tier, source).train_losses == pytest.approx(train(sealed, tier, SGD).train_losses, abs=1e-6)


def test_the_rule_is_told_nothing_but_what_it_may_know(sealed, tier):
    source = SGD + (
        "import sys, gc, numpy\n"
        "def schedule(step, horizon, optimizers):\n"
        "    if step == 3:\n"
        "        found = [o for o in gc.get_objects() if torch.is_tensor(o) and o.dtype == torch.int64]\n"
        "        arrays = [o for o in found if o.numel() > 64]\n"
        "        print('long tensors', len(arrays), 'argv', len(sys.argv))\n"
    )  # fmt: skip
    assert "long tensors 0 argv 2" in train(sealed, tier, source).log


# --- how a run ends otherwise ---

FAULTS = {
    "raises": ("raise ValueError('boo')", {}, "candidate_error"),
    "exits": ("import os; os._exit(0)", {}, "candidate_exited"),
    "calls sys.exit": ("raise SystemExit(0)", {}, "candidate_error"),
    "sleeps": ("import time; time.sleep(60)", {"stall_s": 1.0}, "candidate_stalled"),
    "sleeps to the deadline": ("import time; time.sleep(60)", {"deadline_s": 2.0}, "deadline"),
    "takes memory": ("optimizers.append(torch.ones(1 << 29))", {"memory_bytes": 1 << 28}, "candidate_memory"),
    "sets NaN": ("optimizers[0].param_groups[0]['params'][0].data.fill_(float('nan'))", {}, "nonfinite_loss"),
    "ignores SIGTERM and hangs": (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
        {"stall_s": 1.0},
        "candidate_stalled",
    ),
    "stops itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", {"stall_s": 1.0}, "candidate_stalled"),
    "answers garbage": (
        "import os, stat\n[os.write(i, b'\\xff' * 64) for i in range(3, 9) if _is_socket(i)]",
        {},
        "candidate_protocol",
    ),
}
IS_SOCKET = """
import os, stat
def _is_socket(fd):
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        return False
"""


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_end_the_run_with_a_reason_and_leave_no_process(backend, tier, fault):
    body, limits, reason = FAULTS[fault]
    if fault == "stops itself" and backend.sandbox == "bubblewrap":
        reason = "completed"  # the init of a pid namespace cannot stop itself
    before = of_this_process()
    result = train(backend, tier, IS_SOCKET + schedule(body), **limits)
    assert result.exit_reason == reason, result.detail
    assert result.steps >= 3
    assert left_after(of_this_process() - before, 5) == []


@pytest.mark.parametrize("source", ["x = (", "import torch\n", "raise RuntimeError('at import')"])
def test_a_broken_optimizer_file_is_an_error_with_a_log(sealed, tier, source):
    result = train(sealed, tier, source)
    assert result.exit_reason == "candidate_error"
    assert result.steps == 0
    assert "optimizer.py" in result.log


def test_a_slow_rule_is_refused_with_the_figure(sealed, tier):
    source = SGD + (
        "import time\n"
        "def schedule(step, horizon, optimizers):\n"
        "    until = time.process_time() + 0.2\n"
        "    while time.process_time() < until: pass\n"
    )
    result = train(sealed, tier, source, steps=30)
    assert result.exit_reason == "rule_too_slow"
    assert "times that of forward + backward" in result.detail
    assert result.steps < 12


def test_work_between_the_steps_counts_as_the_rules_time(sealed, tier):
    source = SGD + (
        "import threading\n"
        "def spin():\n"
        "    while True:\n"
        "        torch.randn(300, 300) @ torch.randn(300, 300)\n"
        "for _ in range(3): threading.Thread(target=spin, daemon=True).start()\n"
    )
    # in the window the spinning threads take all the time there is, in steps as well as between them
    result = train(sealed, tier, source, steps=150, rule_time=0.5)
    assert result.exit_reason == "rule_too_slow"


def test_detached_children_of_a_plain_candidate_are_found_and_killed(tier):
    marker = f"sleep {60 + os.getpid() % 100}.25"
    body = f"import subprocess; subprocess.Popen('{marker}'.split(), start_new_session=True); raise ValueError"
    backend = LocalBackend("plain")
    try:
        assert train(backend, tier, schedule(body)).exit_reason == "candidate_error"
    finally:
        backend.close()
    assert marker not in command_lines()


def test_cancel_ends_a_run_at_once(sealed, tier):
    run = sealed.start(rule_job(tier, tier.records["slow"].sources["optimizer.py"], 190))
    while run.progress() is None:
        time.sleep(0.05)
    began = time.monotonic()
    run.cancel()
    result = run.result(20)
    assert result.exit_reason == "cancelled"
    assert 0 < result.steps < 190
    assert result.device_seconds > 0
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("warm", [False, True])
def test_closing_the_backend_leaves_no_process(tier, warm):
    before = of_this_process()
    backend = LocalBackend("auto", warm)
    run = backend.start(rule_job(tier, schedule("import time; time.sleep(100)"), 10))
    time.sleep(1)
    started = of_this_process() - before
    assert len(started) >= 3
    backend.close()
    assert run.done()
    assert left_after(started, 5) == []


def test_a_wrong_job_is_our_error_and_says_why(tier):
    backend = LocalBackend("plain")
    try:
        job = rule_job(tier, SGD, 5, shards=("no_such_shard",))
        with pytest.raises(BackendError, match="no shard no_such_shard"):
            backend.start(job).result(60)
    finally:
        backend.close()


def test_without_torch_the_error_says_how_to_get_it(tier, monkeypatch, tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(fake))
    backend = LocalBackend("plain")
    with pytest.raises(BackendError, match="pip install"):
        backend.start(rule_job(tier, SGD, 5)).result(30)
    backend.close()

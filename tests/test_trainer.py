"""The real trainer on a tiny model: what a run yields, and how every fault of a candidate ends it."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest
import torch

from nanogpt_env.backends.local import LocalBackend, sandbox_report
from nanogpt_env.content import content_root
from nanogpt_env.errors import BackendError
from nanogpt_env.tiers import load_tier

SGD = """
import torch
def configure(params, horizon):
    return torch.optim.SGD(params.values(), lr=0.1)
"""


def train(backend, tier, source, steps=8, seed="1", horizon=None, shards=("val_public",), **limits):
    job = tier.job(source, steps, horizon or steps, seed, shards)
    job = job.model_copy(update={"limits": job.limits.model_copy(update=limits)})
    run = backend.start(job)
    return run.result(120)


def schedule(body):
    """A rule whose schedule hook does `body` at step 3."""
    lines = "\n".join("        " + line for line in body.strip().splitlines())
    return f"{SGD}\ndef schedule(step, horizon, optimizers):\n    if step == 3:\n{lines}\n"


def in_process(tier, source, steps, seed):
    """Losses of the same training with the rule applied in this process, written independently."""
    import sys

    sys.path.insert(0, str(content_root() / "gpu_backend"))
    from trainer import Result, StepsJob
    from training import Training

    job = tier.job(source, steps, steps, seed, ("val_public",))
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
    source = tier.records["fast"].source
    result = train(backend, tier, source, steps=12, horizon=48)
    assert result.exit_reason == "completed"
    assert len(result.train_losses) == result.steps == 12
    assert result.tokens == 12 * 8 * 64
    assert result.flops == 12 * tier.flops_per_step()
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
    source = tier.records["fast"].source
    a, b, c = (train(sealed, tier, source, steps=6, seed=seed) for seed in ("x", "x", "y"))
    assert a.train_losses == b.train_losses != c.train_losses
    assert a.val_losses == b.val_losses


@pytest.mark.parametrize("name", ["slow", "fast"])
def test_isolated_and_in_process_losses_agree(sealed, tier, name):
    source = tier.records[name].source
    isolated = train(sealed, tier, source, steps=20, seed="same")
    assert isolated.train_losses == pytest.approx(in_process(tier, source, 20, "same"), abs=1e-6)


def test_flops_agree_with_torch_counting_the_real_model(tier):
    import sys

    sys.path.insert(0, str(content_root() / "gpu_backend"))
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
    assert tier.flops_per_step() == 8 * 64 * flops_per_token(ModelConfig(**tier.table.model.model_dump()))


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
    result = train(backend, tier, IS_SOCKET + schedule(body), **limits)
    assert result.exit_reason == reason, result.detail
    assert result.steps >= 3
    assert _hosts() <= 2  # at most the warm spare: a launcher and its host


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
    assert marker not in _command_lines()


def test_cancel_ends_a_run_at_once(sealed, tier):
    run = sealed.start(tier.job(tier.records["slow"].source, 190, 190, "1", ("val_public",)))
    while run.progress() is None:
        time.sleep(0.05)
    began = time.monotonic()
    run.cancel()
    result = run.result(20)
    assert result.exit_reason == "cancelled"
    assert 0 < result.steps < 190
    assert result.device_seconds > 0
    assert time.monotonic() - began < 10


def test_closing_the_backend_leaves_no_process(tier):
    backend = LocalBackend("auto", warm=True)
    run = backend.start(tier.job(schedule("import time; time.sleep(100)"), 10, 10, "1", ("val_public",)))
    time.sleep(1)
    backend.close()
    assert run.done()
    assert str(content_root() / "gpu_backend" / "trainer.py") not in "".join(
        line for line in _command_lines().splitlines() if f"--hide {os.environ['NANOGPT_ENV_CACHE']}" in line
        and f" {os.getpid()} " in line
    )  # fmt: skip


def test_a_wrong_job_is_our_error_and_says_why(tier):
    backend = LocalBackend("plain")
    try:
        job = tier.job(SGD, 5, 5, "1", ("no_such_shard",))
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
        backend.start(tier.job(SGD, 5, 5, "1", ("val_public",))).result(30)
    backend.close()


# --- the sandbox ---

PROBE = """
import os, socket, ctypes, subprocess
def attempt(name, f):
    try:
        f()
        print(name, 'ALLOWED')
    except OSError as error:
        print(name, 'refused', error.errno)
for family in ('AF_INET', 'AF_INET6', 'AF_NETLINK', 'AF_PACKET'):
    attempt(family, lambda: socket.socket(getattr(socket, family), socket.SOCK_DGRAM))
def unix(name):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    s.connect(name)
attempt('abstract', lambda: unix('\\0nanogpt-test'))
for path in ('/x', '/usr/x', '/etc/x', '/dev/x', '/proc/sys/kernel/core_pattern', '/trainer/rule_host.py'):
    attempt('write ' + path, lambda: open(path, 'w'))
for folder, below, names in os.walk('/proc'):
    below[:] = [name for name in below if name not in ('1', 'self', 'thread-self')]
    for path in [os.path.join(folder, name) for name in names]:
        try:
            os.close(os.open(path, os.O_WRONLY))
            print('write', path, 'ALLOWED')
        except OSError:
            pass
attempt('fork', os.fork)
attempt('subprocess', lambda: subprocess.run(['/bin/true']))
def fill():
    with open('/tmp/a', 'wb', buffering=0) as f:
        if f.write(b'x' * (64 << 20)) < 64 << 20: raise OSError(28, 'short')
attempt('fill /tmp', fill)
attempt('kill -1', lambda: os.kill(-1, 9))
libc = ctypes.CDLL(None, use_errno=True)
for name, arguments in (('memfd_create', (b'x', 0)), ('unshare', (0x10000000,)), ('ptrace', (0, 0, 0, 0))):
    libc_result = getattr(libc, name)(*arguments)
    print(name, 'ALLOWED' if libc_result >= 0 else 'refused')
print('content', [p for p in HIDDEN if os.path.exists(p)])
print('environment', sorted(os.environ))
print('pids', [p for p in os.listdir('/proc') if p.isdigit()])
"""


def test_the_sandbox_shows_nothing_and_lets_nothing_out(sealed, tier, monkeypatch):
    import socket

    root = content_root()
    hidden = [str(root / "envs"), str(root / "gpu_backend"), os.environ["NANOGPT_ENV_CACHE"], str(Path.home() / ".ssh")]
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("\0nanogpt-test")
        listener.listen()
        result = train(sealed, tier, f"HIDDEN = {hidden!r}\n{PROBE}\n{SGD}", steps=2)
    assert result.exit_reason == "completed", result.log
    assert "ALLOWED" not in result.log
    assert "content []" in result.log
    assert "OPENAI" not in result.log
    assert "pids ['1']" in result.log


def test_memory_outside_the_address_space_cannot_be_hoarded(sealed, tier):
    body = """
import os
for i in range(200):
    with open(f'/dev/shm/{i}', 'wb', buffering=0) as f:
        f.write(b'x' * (1 << 20))
"""
    assert train(sealed, tier, schedule(body)).exit_reason == "candidate_error"


def test_doctor_report_names_the_reason_when_bubblewrap_is_missing(monkeypatch):
    report = sandbox_report()
    assert report["auto"] == "bubblewrap"
    assert report["plain"]["trusted"] is False


def _command_lines():
    lines = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            lines.append(f"{entry.name} " + (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return "\n".join(lines)


def _hosts():
    """Rule hosts that belong to this test process's backends (other test runs may go on beside us)."""
    cache = os.environ["NANOGPT_ENV_CACHE"]
    trainers = {
        line.split(" ", 1)[0] for line in _command_lines().splitlines() if "trainer.py" in line and cache in line
    }
    children = 0
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            if entry.read_text(errors="replace").rpartition(")")[2].split()[1] in trainers:
                children += 1
        except OSError:
            continue
    return children


# --- holes found by reviewers, kept closed ---


@pytest.mark.parametrize("name", [rb"\xff\xfe", rb"\x1cVmHWM:", rb"\x1cVmHWM: 1 1", rb"\nVmHWM: 1 kB\n"])
def test_a_process_name_of_odd_bytes_is_no_failure_of_ours(sealed, tier, name):
    # it made the trainer's reading of /proc fail, or say what the candidate wanted
    source = SGD + f"torch.ctypes.CDLL(None).prctl(15, b'{name.decode()}', 0, 0, 0)\n"
    result = train(sealed, tier, source, steps=2)
    assert result.completed
    assert result.candidate_peak_bytes > 50 << 20


def test_an_unexpected_trainer_fault_is_a_result_not_a_free_rerun(sealed, tier, tmp_path, monkeypatch):
    import shutil

    root = tmp_path / "root"
    shutil.copytree(content_root() / "gpu_backend", root / "gpu_backend")
    training = root / "gpu_backend" / "training.py"
    training.write_text(training.read_text().replace("rule.step(step, seconds)", "raise ZeroDivisionError", 1))
    monkeypatch.setattr("nanogpt_env.backends.local.content_root", lambda: root)
    backend = LocalBackend("bubblewrap")
    try:
        assert train(backend, tier, SGD).exit_reason == "trainer_error"
    finally:
        backend.close()


def test_readout_counts_as_the_rules_time(sealed, tier):
    source = SGD + (
        "import time\n"
        "def readout(params, optimizers):\n"
        "    until = time.process_time() + 2.0\n"
        "    while time.process_time() < until: pass\n"
        "    return {}\n"
    )
    result = train(sealed, tier, source, steps=12)
    assert result.exit_reason == "rule_too_slow"


BURN = """
import torch, time
def burn(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until: pass
"""


def test_readout_and_steps_share_one_allowance(sealed, tier):
    def burning(step_s, readout_s, rule_time):
        source = (
            f"{SGD}{BURN}last = 0\n"
            f"def schedule(step, horizon, optimizers):\n    global last\n    last = step\n    burn({step_s})\n"
            f"def readout(params, optimizers):\n    if last == 11: burn({readout_s})\n    return {{}}\n"
        )
        return train(sealed, tier, source, steps=12, rule_time=rule_time, stall_s=60.0)

    cap = 1.4 * burning(0.1, 0, 1000.0).rule_time_ratio
    assert burning(0.1, 0, cap).completed
    assert burning(0, 1.0, cap).completed
    assert burning(0.1, 1.0, cap).exit_reason == "rule_too_slow"


def test_loading_and_the_first_step_share_one_allowance(sealed, tier):
    source = SGD + BURN + "burn(3)\ndef schedule(step, horizon, optimizers):\n    if step == 0: burn(3)\n"
    assert train(sealed, tier, source, steps=2, setup_s=30.0).completed
    assert train(sealed, tier, source, steps=2, setup_s=4.5).exit_reason == "candidate_stalled"


def test_a_candidate_cannot_outlive_its_killed_trainer(tier):
    source = SGD + (
        "torch.ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\ndef schedule(step, horizon, optimizers):\n    while True: pass\n"
    )
    backend = LocalBackend("bubblewrap")
    run = backend.start(tier.job(source, 5, 5, "1", ("val_public",)).model_copy())
    time.sleep(6)
    trainer = run._process.pid
    hosts = _children_of(trainer)
    assert hosts
    os.kill(trainer, 9)
    with pytest.raises(BackendError):
        run.result(20)
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{p}/cmdline").exists() for p in hosts) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [p for p in hosts if _alive(p)]
    backend.close()


def test_auto_is_decided_once_for_a_backend(tier):
    backend = LocalBackend("auto")
    try:
        assert train(backend, tier, SGD, steps=1).sandbox.name == backend.sandbox == "bubblewrap"
    finally:
        backend.close()


def test_folders_named_hidden_are_not_visible_below_a_mounted_path(tier):
    import sysconfig

    folder = Path(sysconfig.get_paths()["purelib"]) / "scipy"  # stands for a tier installed by a package
    source = SGD + f"import os\nprint('seen', os.listdir({str(folder)!r}))\n"
    backend = LocalBackend("bubblewrap", hidden=[folder])
    try:
        assert "seen []" in train(backend, tier, source, steps=1).log
    finally:
        backend.close()


def test_an_interpreter_below_tmp_works(tier, tmp_path):
    """The sandbox mounts its own /tmp, which must not hide a virtual environment that lies there."""
    import subprocess
    import sys

    venv = Path("/tmp") / f"nanogpt-venv-{os.getpid()}"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--symlinks", venv], check=True)
    try:
        site = next(venv.glob("lib/python*/site-packages"))
        (site / "ours.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
        report = subprocess.run(
            [venv / "bin" / "python", content_root() / "gpu_backend" / "sandbox.py"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert '"auto": "bubblewrap"' in report.stdout, report.stdout
    finally:
        import shutil

        shutil.rmtree(venv)


def _children_of(parent):
    """All descendants."""
    found, level = [], [parent]
    while level:
        below = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                if int(entry.read_text(errors="replace").rpartition(")")[2].split()[1]) in level:
                    below.append(int(entry.parent.name))
            except OSError:
                continue
        found += below
        level = below
    return found


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

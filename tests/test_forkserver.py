"""Warm starts: forked candidates are as confined as cold ones, see nothing of one another, and leave nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import descendants, left_after, of_this_process
from rules import SGD, rule_job, schedule, train
from test_timed import HONEST, job_of

from nanogpt_env.backends.local import LocalBackend, sandbox_report

# --- the same confinement ---

CONFINEMENT = """
import json, os, resource, signal, socket
def text(path):
    try:
        return open(path).read()
    except OSError as error:
        return error.errno
def size(folder):
    found = os.statvfs(folder)
    return found.f_blocks * found.f_frsize
status = dict(line.split(':\\t', 1) for line in text('/proc/self/status').splitlines())
own = {key: os.environ[key] for key in os.environ if not key.startswith('TORCHINDUCTOR')}  # torch's, with our uid
mounts = {}
for line in text('/proc/self/mountinfo').splitlines():
    words = line.split(' ')
    mounts[words[4]] = [words[3], sorted(words[5].split(',')), words[words.index('-') + 1]]  # the topmost
print('CONFINEMENT' + json.dumps({
    'status': {k: v for k, v in status.items() if k.startswith(('Cap', 'Gid', 'Groups', 'NS', 'NoNew', 'Pid', 'PPid',
               'Seccomp', 'Shd', 'Sig', 'Threads', 'Tracer', 'Uid', 'Umask')) and k != 'SigQ'},
    'environment': own,
    'here': [os.getcwd(), socket.gethostname(), os.getsid(0), os.getpgid(0), os.nice(0)],
    'open files': len(os.listdir('/proc/self/fd')),
    'folders': {f: sorted(os.listdir(f)) for f in ('/', '/dev', '/dev/shm', '/dev/pts', '/etc')},
    'links': [(line.split(':')[0], line.split()[1]) for line in text('/proc/net/dev').splitlines()[2:]],
    'limits': {n: resource.getrlimit(getattr(resource, n)) for n in dir(resource) if n.startswith('RLIMIT_')
               and n != 'RLIMIT_AS'},
    'signals': {s.name: str(signal.getsignal(s)) for s in signal.Signals},
    'ids': [text(f'/proc/self/{n}') for n in ('uid_map', 'gid_map', 'setgroups', 'cgroup', 'oom_score_adj')],
    'ipc': [text(f'/proc/sysvipc/{n}') for n in ('shm', 'sem', 'msg')] + [text('/proc/net/unix')[:3]],
    'sizes': [size('/tmp'), size('/dev/shm')],
    'owners': [os.stat(p).st_uid for p in ('/', '/tmp', '/dev/shm', '/proc/self/fd', '/proc/sys', '/usr')],
    'mounts': {k: v for k, v in mounts.items() if not k.startswith('/trainer')},
    'processes': [name for name in os.listdir('/proc') if name.isdigit()],
    'may dump': torch.ctypes.CDLL(None).prctl(3, 0, 0, 0, 0),
}))
"""


@pytest.fixture(scope="module")
def cold():
    backend = LocalBackend("bubblewrap")
    yield backend
    backend.close()


@pytest.fixture
def own():
    """A backend with warm starts of its own, to be broken."""
    backend = LocalBackend("bubblewrap", warm=True)
    backend.prepare()
    yield backend
    backend.close()


def forked(result):
    assert result.sandbox.note == "warm start", result.sandbox.note
    assert result.sandbox.trusted and result.sandbox.name == "bubblewrap"
    return result


def test_a_forked_candidate_is_confined_like_a_cold_one(sealed, cold, tier):
    def told(backend):
        result = train(backend, tier, f"{SGD}{CONFINEMENT}", steps=1)
        line = next(x for x in result.log.splitlines() if x.startswith("CONFINEMENT"))
        line = re.sub(r"nanogpt_env-[\d-]+", "GROUP", line)  # each has a control group of its own
        return result, json.loads(line.removeprefix("CONFINEMENT"))

    (one, a), (other, b) = told(cold), told(sealed)
    assert one.sandbox.note == "cold start: warm starts were not asked for"
    forked(other)
    for key in a:
        assert a[key] == b[key], key
    assert int(a["status"]["CapEff"], 16) == 0 and a["status"]["Seccomp"] == "2"


# --- candidates see nothing of one another ---

LEAVE = """
import builtins, ctypes, mmap, numpy, os, random, signal, socket, sys, threading, time
kept = []
def leave():
    for folder in ('/tmp', '/dev/shm'):
        kept.append(open(folder + '/trace', 'w'))
    os.environ['TRACE'] = torch.trace_left = builtins.trace_left = 'trace'
    torch.nn.functional.relu = torch.tanh
    sys.modules['trace_left'] = kept
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.umask(0)
    os.chdir('/proc')
    kept.append(socket.socket(socket.AF_UNIX))
    kept[-1].bind(chr(0) + 'trace')
    kept[-1].listen()
    kept.extend(os.openpty())
    ctypes.CDLL(None).prctl(15, b'trace', 0, 0, 0)
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    kept.append(mmap.mmap(-1, 1 << 20))
    kept[-1].write(b'q7Zr2WxNk5VtB9Lm' * 1000)
    kept.append(b'q7Zr2WxNk5VtB9Lm' * 1000)
    for generator in (random.seed, numpy.random.seed, torch.manual_seed):
        generator(7)
"""
FIND = """
import builtins, numpy, os, random, re, signal, socket, sys
def in_memory():
    half, rest = b'q7Zr2WxN', b'k5VtB9Lm'  # together nowhere in this text
    with open('/proc/self/mem', 'rb', 0) as memory:
        for line in open('/proc/self/maps').read().splitlines():
            start, end = (int(x, 16) for x in line.split(' ')[0].split('-'))
            if 'rw' not in line:
                continue
            for at in range(start, end, 1 << 24):
                try:
                    memory.seek(at)
                    part = memory.read(min(1 << 24, end - at))
                except (OSError, OverflowError):
                    break
                if any(part[m.end():m.end() + 8] == rest for m in re.finditer(half, part)):
                    return True
    return False
def connects():
    with socket.socket(socket.AF_UNIX) as s:
        return s.connect_ex(chr(0) + 'trace') == 0
def find():
    draws = random.random(), numpy.random.random(), torch.initial_seed()
    looked = {
        '/tmp': os.path.exists('/tmp/trace'),
        '/dev/shm': os.path.exists('/dev/shm/trace'),
        'environment': 'TRACE' in os.environ,
        'attribute': hasattr(torch, 'trace_left') or hasattr(builtins, 'trace_left') or 'trace_left' in sys.modules,
        'patch': torch.nn.functional.relu is torch.tanh,
        'handler': signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL,
        'umask': os.umask(0) == 0,
        'folder': os.getcwd() != '/tmp',
        'socket': connects(),
        'terminal': os.listdir('/dev/pts') != ['ptmx'],
        'name': 'trace' in open('/proc/self/comm').read(),
        'thread': len(os.listdir('/proc/self/task')) > 1,
        'files': len(os.listdir('/proc/self/fd')) > 8,
        'memory': in_memory(),
        'random': draws[0] == random.Random(7).random(),
        'numpy': draws[1] == numpy.random.RandomState(7).random(),
        'torch': draws[2] == 7,
        'processes': len([name for name in os.listdir('/proc') if name.isdigit()]) > 1,
    }
    print('found', sorted(name for name in looked if looked[name]), 'of', len(looked))
"""


def test_nothing_of_an_earlier_candidate_is_visible(sealed, tier):
    control = forked(train(sealed, tier, f"{SGD}{LEAVE}{FIND}leave()\nfind()", steps=1))
    names = control.log.partition("[")[2].partition("]")[0].split(", ")
    assert len(names) == 17 and "of 18" in control.log, control.log  # all but other processes: the search works
    later = forked(train(sealed, tier, f"{SGD}{FIND}find()", steps=1))
    assert "found [] of 18" in later.log


def test_nothing_of_a_candidate_at_the_same_time_is_visible(sealed, tier):
    wait = "def schedule(step, horizon, optimizers):\n    if step: time.sleep(1000)\n"
    first = sealed.start(rule_job(tier, f"{SGD}{LEAVE}leave()\nprint('left', flush=True)\n{wait}", 3))
    while first.progress() is None and not first.done():
        time.sleep(0.05)
        if left_something(of_this_process()):
            break
    second = forked(train(sealed, tier, f"{SGD}{FIND}find()", steps=1))
    assert not first.done()
    first.cancel()
    assert "left" in first.result(20).log
    assert "found [] of 18" in second.log


def left_something(processes):
    """Whether the first candidate has got as far as its name."""
    return any(name(pid) == "trace" for pid, _ in processes)


def name(pid):
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return ""


def test_random_numbers_that_no_job_seeds_differ_between_candidates(sealed, tier):
    source = f"import os, random, numpy\nprint(random.random(), numpy.random.random(), os.urandom(8).hex())\n{SGD}"
    a, b = (forked(train(sealed, tier, source, steps=1)).log.split() for _ in range(2))
    assert all(x != y for x, y in zip(a, b, strict=True))


def test_results_are_those_of_a_cold_start_to_the_bit(sealed, cold, tier):
    source = tier.records["fast"].sources["optimizer.py"]
    a, b = (train(backend, tier, source, steps=12, seed="same") for backend in (cold, sealed))
    forked(b)
    assert (a.train_losses, a.val_losses, a.val_points) == (b.train_losses, b.val_losses, b.val_points)
    a, b = (backend.start(job_of(tier, HONEST, seed="same")).result(120) for backend in (cold, sealed))
    assert a.completed and forked(b).completed
    assert (a.val_losses, a.log) == (b.val_losses, b.log)


# --- nothing stays behind ---

SLEEP = schedule("import time; time.sleep(1000)")


def under_way(backend, tier):
    """A run whose candidate sleeps."""
    known = len(candidates(backend)) if backend._server._ready else 0
    run = backend.start(rule_job(tier, SLEEP, 9))
    until = time.monotonic() + 60
    while len(candidates(backend)) == known and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)
    assert not run.done()
    return run


def candidates(backend):
    return [pid for pid, _ in descendants(zygote(backend))]


def children(pid):
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def zygote(backend):
    """bubblewrap's only child."""
    server = backend._server._process.pid
    (launcher,) = [pid for pid in children(server) if name(pid) == "bwrap"]
    (inner,) = children(launcher)
    return inner


def trainers(backend):
    return [pid for pid in children(backend._server._process.pid) if name(pid) != "bwrap"]


def test_a_killed_trainer_takes_its_candidate_along_and_no_other(own, tier):
    train(own, tier, SGD, steps=1)
    one = under_way(own, tier)
    (first,), (trainer,) = candidates(own), trainers(own)
    two = under_way(own, tier)
    started = {(pid, start) for pid, start in of_this_process() if pid in (first, trainer)}
    os.kill(trainer, signal.SIGKILL)
    with pytest.raises(Exception, match="exit code -9"):
        one.result(10)
    assert left_after(started, 5) == []
    assert not two.done() and len(candidates(own)) == 1
    two.cancel()
    assert two.result(10).exit_reason == "cancelled"


@pytest.mark.parametrize("victim", ["server", "zygote", "launcher"])
def test_a_killed_server_or_zygote_takes_all_along_and_is_replaced_once(own, tier, victim):
    for attempt in range(3):
        result = train(own, tier, SGD, steps=1)
        assert result.completed
        if attempt == 2:
            break
        forked(result)
        run = under_way(own, tier)
        inner = zygote(own)
        server = own._server._process.pid
        launcher = next(pid for pid in children(server) if name(pid) == "bwrap")
        started = descendants(server)
        assert len(started) == 4  # bubblewrap, zygote, trainer, candidate
        os.kill({"server": server, "zygote": inner, "launcher": launcher}[victim], signal.SIGKILL)
        if victim == "server":
            with pytest.raises(Exception, match="exit code -9"):
                run.result(10)
        else:
            assert run.result(10).exit_reason == "candidate_exited"
        assert left_after(started, 5) == []
    assert result.sandbox.note == "cold start: the fork server died twice"
    assert result.sandbox.trusted


def test_nothing_outlives_a_killed_owner(tmp_path):
    program = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
from test_forkserver import *
from conftest import TINY
from nanogpt_env.tiers import load_tier
backend = LocalBackend("bubblewrap", warm=True)
backend.prepare()
under_way(backend, load_tier(TINY))
print("ready", flush=True)
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "ready\n"
        started = descendants(owner.pid)
        owner.kill()
    assert len(started) == 5  # server, bubblewrap, zygote, trainer, candidate
    assert left_after(started, 5) == []


def test_a_scratch_folder_has_room_for_so_many_files_only(own, tier):
    body = """
made = 0
try:
    while made < 5000:
        open(f'/tmp/{made}', 'w').close()
        made += 1
except OSError as error:
    print('made', made, error.strerror)
"""
    result = forked(train(own, tier, body + SGD, steps=1))
    assert re.search(r"made 40\d\d No space left", result.log), result.log


def test_many_runs_leave_no_process_file_or_mount(own, tier):
    def held():
        pids = (os.getpid(), own._server._process.pid, zygote(own))
        files = [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]
        return [*files, len(Path(f"/proc/{zygote(own)}/mountinfo").read_text().splitlines())]

    def no_more_than(earlier):  # `earlier` may have counted ends that were about to be closed
        return all(now <= then for now, then in zip(held(), earlier, strict=True))

    train(own, tier, SGD, steps=1)
    before, processes = held(), of_this_process()
    for i in range(30):
        forked(train(own, tier, SGD, steps=1, seed=str(i)))
    assert left_after(of_this_process() - processes, 5) == []
    until = time.monotonic() + 5  # the server closes its ends when it comes to it
    while not no_more_than(before) and time.monotonic() < until:
        time.sleep(0.05)
    assert no_more_than(before), (held(), before)


# --- where it does not work ---


THREAD = "import threading, time; threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        (
            "confine.py",
            '_call("unshare", _NEWUSER)',
            'raise OSError(1, "no user namespaces here")',
            "no user namespaces here",
        ),
        ("confine.py", '_call("unshare", _NEWNS', '_call("unshare", 1 << 40 | _NEWNS', "Invalid argument"),
        ("zygote.py", "    line.send(READY)", f"    {THREAD}; line.send(READY)", "2 threads must not fork"),
        ("zygote.py", "    line.send(READY)", "    raise SystemExit", "ended at once"),
    ],
)
def test_where_forks_are_refused_runs_start_cold_and_say_why(broken, tier, file, old, new, reason):
    broken(file, old, new)
    assert reason in sandbox_report()["warm_starts"]["reason"]
    backend = LocalBackend("auto", warm=True)
    backend.prepare()
    try:
        result = train(backend, tier, SGD, steps=1)
        assert result.completed and result.sandbox.trusted
        assert result.sandbox.note.startswith("cold start: ") and reason in result.sandbox.note
        assert reason in backend.cold_because
    finally:
        backend.close()


def test_a_server_with_threads_does_not_fork(broken, tier):
    broken("forkserver.py", "    track = _fork_on_request", f"    {THREAD}\n    track = _fork_on_request")
    backend = LocalBackend("bubblewrap", warm=True)
    backend.prepare()
    try:
        assert train(backend, tier, SGD, steps=1).sandbox.note == "cold start: the fork server died twice"
    finally:
        backend.close()


def test_a_plain_sandbox_starts_cold(tier):
    backend = LocalBackend("plain", warm=True)
    try:
        assert train(backend, tier, SGD, steps=1).sandbox.name == "plain"
        assert "bubblewrap" in backend.cold_because
    finally:
        backend.close()


def test_this_machine_has_warm_starts():
    assert sandbox_report()["warm_starts"] == {"available": True, "reason": ""}

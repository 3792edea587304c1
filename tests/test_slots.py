"""Cores shared between processes: never too many holders, nothing left by the dead, nobody starved."""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest

from nanogpt_env import BackendError, slots
from nanogpt_env.content import state_dir
from nanogpt_env.slots import Slots

pytestmark = pytest.mark.skipif(not slots.HAS_FLOCK, reason="processes share slots by flock")
PATIENCE_S = 30  # only ever waited out by a failure
CONTEXT = multiprocessing.get_context("forkserver") if slots.HAS_FLOCK else None


@pytest.fixture(scope="module", autouse=True)
def _quick_processes():
    """Forked from a server that has imported this file: a process costs milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        CONTEXT.set_forkserver_preload(["nanogpt_env.slots", "test_slots"])
        process = CONTEXT.Process(target=int)
        process.start()
        process.join()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "slots"


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, 2),
        ("0::/elsewhere", {"cpu.max": "50000 100000"}, 1),
        ("0::/a", {"a/cpu.max": "max 100000"}, 8),
        ("0::/a", {"a/cpu.max": "garbage"}, 8),
        ("0::/a", {"a/cpu.max": "9000000 100000"}, 8),
        ("4:cpu,cpuacct:/x\n3:pids:/x", {"cpu,cpuacct/x/cpu.cfs_quota_us": "300000"}, 3),
        ("4:cpu:/x\n0::/", {"cpu/cpu.cfs_quota_us": "-1"}, 8),
        (None, {}, 8),
    ],
)
def test_a_cpu_quota_counts_as_fewer_cores(tmp_path, monkeypatch, membership, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10, 18)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        if "quota" in name:
            (tmp_path / name).with_name("cpu.cfs_period_us").write_text("100000")
    if membership is not None:
        (tmp_path / "membership").write_text(membership)
    found = slots.usable_cores(tmp_path, tmp_path / "membership")
    assert len(set(found)) == cores and set(found) <= set(range(10, 18))
    assert found == slots.usable_cores(tmp_path, tmp_path / "membership")


def until(condition):
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def held(folder):
    return sorted((row["core"], row["owner"]) for row in Slots("?", [0], folder).status() if row["core"] is not None)


def waiting(folder):
    return [row["owner"] for row in Slots("?", [0], folder).status() if row["core"] is None]


def serve(pipe, *args):
    """A process that does as it is told: answers are cores, or names of exceptions."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    mine, slot = Slots(*args), None
    while (order := pipe.recv()) is not None:
        method, options = order
        try:
            if method == "release":
                pipe.send(slot.release())
            elif method == "sleeper":
                pipe.send(subprocess.Popen(["sleep", "600"], close_fds=False).pid)
            elif method == "fork":
                if not os.fork():
                    pipe.send(os.getpid())
                    time.sleep(600)
            else:
                slot = getattr(mine, method)(**options)
                pipe.send(slot.core)
        except (TimeoutError, KeyboardInterrupt) as error:
            pipe.send(type(error).__name__)


class Client:
    def __init__(self, *args):
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=serve, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()

    def tell(self, method, **options):
        self.pipe.send((method, options))

    def answer(self):
        assert self.pipe.poll(PATIENCE_S), "no answer"
        return self.pipe.recv()

    def ask(self, method="acquire", **options):
        self.tell(method, **options)
        return self.answer()

    def kill(self):
        self.process.kill()
        self.process.join()


@pytest.fixture
def client(folder):
    made = []

    def client(owner, cores=(0,)):
        made.append(Client(owner, cores, folder))
        return made[-1]

    yield client
    for one in made:
        one.kill()
        one.pipe.close()


def queue(client, folder, method="acquire"):
    """Make it wait, and come back when it does."""
    before = len(waiting(folder))
    client.tell(method)
    until(lambda: len(waiting(folder)) == before + 1)


# --- one process -------------------------------------------------------------------------------------------------


def test_cores_are_handed_out_once_and_come_back(folder):
    mine = Slots("me", [3, 5, 3], folder)
    with mine.acquire() as first, mine.acquire() as second:
        assert (first.core, second.core) == (3, 5)
        assert held(folder) == [(3, "me"), (5, "me")]
        with pytest.raises(TimeoutError, match="me: no core in 0 s"):
            mine.acquire(timeout=0)
        first.release()
        first.release()
        mine.acquire(timeout=0).release()
    assert mine.status() == []


def test_what_it_takes_by_default():
    mine = Slots("me")
    assert mine.folder == state_dir() / "slots"
    assert set(mine.cores) == set(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match="at least one core"):
        Slots("me", [])


def test_releasing_twice_does_not_take_it_from_the_next(folder):
    mine = Slots("me", [0], folder)
    first = mine.acquire()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: first.release(), range(100)))
    with mine.acquire(timeout=0):
        first.release()
        assert held(folder) == [(0, "me")]


def test_a_copy_of_the_descriptor_does_not_keep_the_slot(folder):
    """As in a child of `subprocess` between fork and exec."""
    mine = Slots("me", [0], folder)
    slot = mine.acquire()
    copy = os.dup(slot._file.fileno())
    slot.release()
    mine.acquire(timeout=0).release()
    os.close(copy)


def test_a_forgotten_slot_comes_back(folder):
    mine = Slots("me", [0], folder)
    with pytest.warns(ResourceWarning, match="unclosed"):
        mine.acquire()
    assert held(folder) == []


def test_one_core_machine(folder):
    mine = Slots("me", [7], folder)
    with mine.acquire_all() as slot:
        assert (slot.core, slot.cores) == (7, (7,))
        assert mine.status() == [{"core": 7, "owner": "me", "pid": os.getpid(), "exclusive": True}]
        with pytest.raises(TimeoutError):
            mine.acquire(timeout=0)
    with mine.acquire(), pytest.raises(TimeoutError):
        mine.acquire_all(timeout=0)
    assert mine.status() == []


def test_all_cores_are_those_of_others_too(folder):
    with Slots("other", [1], folder).acquire(), pytest.raises(TimeoutError):
        Slots("me", [0], folder).acquire_all(timeout=0)
    with Slots("me", [0], folder).acquire_all(), pytest.raises(TimeoutError):
        Slots("other", [1], folder).acquire(timeout=0)


def test_a_wait_ends_by_timeout_or_cancellation_and_leaves_nothing(folder):
    mine, stop = Slots("me", [0], folder), threading.Event()
    with mine.acquire(), ThreadPoolExecutor() as pool:
        for method in (mine.acquire, mine.acquire_all):
            with pytest.raises(TimeoutError):
                method(timeout=0.1)
            wait = pool.submit(method, cancelled=stop.is_set)
            until(lambda: waiting(folder) == ["me"])
            stop.set()
            with pytest.raises(CancelledError):
                wait.result(PATIENCE_S)
            stop.clear()
            assert waiting(folder) == []
    with pytest.raises(CancelledError):
        mine.acquire(cancelled=lambda: True)
    assert sorted(path.name for path in folder.iterdir()) == ["core-0", "door"]


def test_threads_share_one_object(folder):
    mine, inside, most = Slots("me", [0, 1], folder), [], []

    def work(_):
        with mine.acquire(PATIENCE_S) as slot:
            inside.append(slot.core)
            most.append(sorted(inside))
            time.sleep(0.001)
            inside.remove(slot.core)

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(work, range(40)))
    assert len(most) == 40
    assert all(cores in ([0], [1], [0, 1]) for cores in most)


@pytest.mark.parametrize("kind", ["a file", "in a file", "not ours"])
def test_a_folder_that_cannot_be_used(kind, tmp_path):
    (tmp_path / "file").touch()
    folder = {"a file": tmp_path / "file", "in a file": tmp_path / "file" / "slots", "not ours": Path("/proc/slots")}
    mine = Slots("me", [0], folder[kind])
    for method in (mine.acquire, mine.acquire_all):
        with pytest.raises(BackendError, match=r"cannot use the slots in .*: .*set NANOGPT_ENV_STATE"):
            method(timeout=0)


def test_a_folder_that_is_not_there_is_made(tmp_path):
    mine = Slots("me", [0], tmp_path / "a" / "b")
    assert mine.status() == []
    mine.acquire(timeout=0).release()
    assert mine.folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("garbage", [b"\xff\0{", b"{}", b'{"pid": "x"}', b'{"cores": [1e9]}', b"[" * 100_000])
def test_garbage_in_the_files_does_no_harm(garbage, folder, client):
    folder.mkdir()
    for name in ["core-0", "core-x", "core-", "all", "door", "wait-", "wait-5", "wait-99999999999999999999-1-1"]:
        (folder / name).write_bytes(garbage)
    mine, one, two = Slots("me", [0], folder), client("one"), client("two")
    slot = mine.acquire(timeout=PATIENCE_S)
    queue(one, folder, "acquire_all")
    queue(two, folder)
    for path in {*folder.iterdir()} - {folder / "all"}:  # (its time tells who has given way)
        path.write_bytes(garbage)
    assert held(folder) == [(-1, "?")]
    until(lambda: waiting(folder) == ["one", "two"])  # who waits writes again what it waits for
    slot.release()
    assert one.answer() == 0
    one.ask("release")
    assert two.answer() == 0


def test_without_flock_slots_are_shared_inside_the_process(folder, monkeypatch):
    outside = Slots("me", [0], folder).acquire()
    monkeypatch.setattr(slots, "HAS_FLOCK", False)
    one, two = Slots("one", [0], folder), Slots("two", [0], folder)
    with one.acquire(timeout=0), pytest.raises(TimeoutError):
        two.acquire(timeout=0)
    with two.acquire_all(timeout=0), pytest.raises(TimeoutError):
        one.acquire(timeout=0)
    slot = one.acquire()
    with ThreadPoolExecutor() as pool:
        wait = pool.submit(two.acquire)
        until(lambda: [(row["owner"], row["core"]) for row in one.status()] == [("one", 0), ("two", None)])
        slot.release()
        wait.result(PATIENCE_S).release()
    assert one.status() == []
    assert not slots._locked
    monkeypatch.undo()
    outside.release()


# --- several processes -------------------------------------------------------------------------------------------


def hammer(counter, seed, rounds, whole, *args):
    """Short holds; `counter` is [singles, exclusives, most singles, overlaps, rounds done]."""
    mine, rng = Slots(*args), random.Random(seed)
    for _ in range(rounds):
        exclusive = rng.random() < whole
        with (mine.acquire_all if exclusive else mine.acquire)(PATIENCE_S):
            with counter.get_lock():
                counter[exclusive] += 1
                counter[2] = max(counter[2], counter[0])
                counter[3] += counter[1] > 1 or (counter[1] == 1 and counter[0] > 0)
            time.sleep(rng.random() * 0.002)
            with counter.get_lock():
                counter[exclusive] -= 1
                counter[4] += 1


@pytest.mark.parametrize(("cores", "whole"), [((0,), 0), ((0, 1), 0), ((0, 1, 2), 0.2), ((0, 1), 1)])
def test_never_more_holders_than_cores(cores, whole, folder):
    counter = CONTEXT.Array("i", 5)
    args = [(counter, seed, 40, whole, f"owner-{seed % 3}", cores, folder) for seed in range(4)]
    workers = [CONTEXT.Process(target=hammer, args=one, daemon=True) for one in args]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE_S)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert counter[2] <= len(cores)
    assert (counter[0], counter[1], counter[3], counter[4]) == (0, 0, 0, 160)
    assert not list(folder.glob("wait-*"))


def test_an_exclusive_request_is_not_starved_by_singles(folder):
    counter = CONTEXT.Array("i", 5)
    args = [(counter, seed, 10**6, 0, f"owner-{seed}", (0, 1), folder) for seed in range(3)]
    workers = [CONTEXT.Process(target=hammer, args=one, daemon=True) for one in args]
    for worker in workers:
        worker.start()
    mine = Slots("timed", (0, 1), folder)
    for _ in range(3):
        done = counter[4]
        until(lambda done=done: counter[4] > done + 5)
        with mine.acquire_all(PATIENCE_S):
            assert (counter[0], done < counter[4]) == (0, True)
            done = counter[4]
            time.sleep(0.1)
            assert (counter[0], counter[4]) == (0, done)
    for worker in workers:
        worker.kill()
        worker.join()


def test_the_slot_of_a_killed_holder_comes_back(client, folder):
    for method in ("acquire", "acquire_all"):
        holder, waiter = client("holder"), client("waiter")
        assert holder.ask(method) == 0
        queue(waiter, folder)
        assert Slots("?", [0], folder).status()[0]["pid"] == holder.process.pid
        holder.kill()
        assert waiter.answer() == 0
        waiter.kill()
        assert held(folder) == []


@pytest.mark.parametrize("method", ["acquire", "acquire_all"])
def test_a_killed_waiter_is_not_waited_for(method, client, folder):
    holder, first, second = client("holder"), client("first"), client("second")
    assert holder.ask() == 0
    queue(first, folder, method)
    queue(second, folder)
    first.kill()
    assert waiting(folder) == ["second"]
    holder.ask("release")
    assert second.answer() == 0
    [left] = [path for path in folder.glob("wait-*") if str(first.process.pid) in path.name.split("-")]
    os.utime(left, (1, 1))
    second.ask("release")
    until(lambda: not held(folder))
    Slots("me", [0], folder).acquire().release()  # sweeps up what has been there for long
    assert not left.exists()


@pytest.mark.parametrize("method", ["acquire", "acquire_all"])
def test_a_stopped_waiter_is_passed_over_and_goes_on_later(method, client, folder, monkeypatch):
    mine, stopped = Slots("me", [0], folder), client("stopped")
    slot = mine.acquire()
    queue(stopped, folder, method)
    os.kill(stopped.process.pid, signal.SIGSTOP)
    slot.release()
    with pytest.raises(TimeoutError):  # it may just be slow
        mine.acquire(timeout=0)
    monkeypatch.setattr(slots, "STALE_S", 0.2)
    with mine.acquire(timeout=PATIENCE_S):
        os.kill(stopped.process.pid, signal.SIGCONT)
    assert stopped.answer() == 0


def test_ctrl_c_ends_a_wait_and_leaves_nothing(client, folder):
    mine, waiter = Slots("me", [0], folder), client("waiter")
    for method in ("acquire", "acquire_all"):
        with mine.acquire():
            queue(waiter, folder, method)
            os.kill(waiter.process.pid, signal.SIGINT)
            assert waiter.answer() == "KeyboardInterrupt"
            assert waiting(folder) == []
            assert not list(folder.glob("wait-*"))
    assert waiter.ask() == 0


def test_a_greedy_owner_does_not_keep_others_from_their_first(client, folder):
    greedy = [client("greedy", (0, 1)) for _ in range(5)]
    assert [greedy[0].ask(), greedy[1].ask()] == [0, 1]
    for one in greedy[2:]:
        queue(one, folder)
    first, second = client("first", (0, 1)), client("second", (0, 1))
    queue(first, folder)
    queue(second, folder)
    assert waiting(folder) == ["greedy"] * 3 + ["first", "second"]
    greedy[0].ask("release")
    assert first.answer() == 0  # has none; greedy has one, and came before
    greedy[1].ask("release")
    until(lambda: len(held(folder)) == 2)
    assert sorted(owner for _, owner in held(folder)) == ["first", "greedy"]  # both had none: first come
    first.ask("release")
    assert second.answer() == 0


def test_who_wants_another_core_does_not_wait_in_line(client, folder):
    mine, blocked, free = Slots("me", [0], folder), client("blocked", (0,)), client("free", (1,))
    with mine.acquire():
        queue(blocked, folder)
        assert free.ask() == 1
    assert blocked.answer() == 0


def test_single_and_exclusive_requests_take_turns(client, folder):
    single, first, second = client("single"), client("first"), client("second")
    mine = Slots("me", [0, 1], folder)
    slot = mine.acquire()
    queue(first, folder, "acquire_all")
    queue(second, folder, "acquire_all")
    queue(single, folder)
    with pytest.raises(TimeoutError):  # core 1 is free, but an exclusive request waits
        mine.acquire(timeout=0)
    slot.release()
    assert first.answer() == 0
    assert waiting(folder) == ["second", "single"]
    late = client("late")
    queue(late, folder)
    first.ask("release")
    assert single.answer() == 0  # gave way once
    single.ask("release")
    assert second.answer() == 0  # `late` came after the last exclusive grant
    second.ask("release")
    assert late.answer() == 0


@pytest.mark.parametrize("child", ["sleeper", "fork"])
def test_children_do_not_inherit_slots(child, client, folder):
    holder = client("holder", (0, 1))
    assert holder.ask() == 0
    pid = holder.ask(child)
    try:
        assert held(folder) == [(0, "holder")]  # the child closed its copy without unlocking
        holder.kill()
        assert held(folder) == []
        os.kill(pid, 0)  # is still there
        with Slots("me", [0], folder).acquire_all(timeout=0):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)


def fork_while_threads_work(pipe, *args):
    mine = Slots(*args)

    def work():
        while True:
            with mine.acquire(), contextlib.suppress(TimeoutError):
                mine.acquire(timeout=0).release()

    kept = mine.acquire()
    for _ in range(3):
        threading.Thread(target=work, daemon=True).start()
    children = []
    for _ in range(25):
        time.sleep(0.003)
        if not (pid := os.fork()):
            kept.release()  # not the child's to release
            with Slots("child", [9], mine.folder).acquire(PATIENCE_S):  # the child can take its own
                pass
            time.sleep(600)
        children.append(pid)
    pipe.send(children)
    time.sleep(600)


def test_forks_of_a_threaded_process_keep_nothing(folder):
    pipe, theirs = CONTEXT.Pipe()
    parent = CONTEXT.Process(target=fork_while_threads_work, args=(theirs, "parent", (0, 1, 2), folder), daemon=True)
    parent.start()
    assert pipe.poll(PATIENCE_S)
    children = pipe.recv()
    try:
        assert (0, "parent") in held(folder)
        parent.kill()
        parent.join()
        until(lambda: not held(folder) and not waiting(folder))  # (children may still be taking turns at core 9)
        with Slots("me", [0, 1, 2], folder).acquire_all(timeout=PATIENCE_S):
            pass
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)

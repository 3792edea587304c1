"""CPU cores for training runs, shared by all processes of one user on one host.

Whoever locks (flock) a core's file holds the core; `all` is an exclusive holder's file, `door` that of whoever is just
taking something; each waiter has a `wait-…`. Waiters look every few ms, and all compute the same order.
Guaranteed: one holder per core, none beside the holder of all, threads included. A lock ends with its process, kill -9
too. No child inherits it: a trainer that outlives its owner, until it notices, does not keep the core (it would have to
carry a descriptor to candidates' code). The owner with fewest cores goes first, then first come, first served. While
one waits for all, only those start who waited when the last such was granted: neither kind starves. Who has not looked
for `STALE_S` (a stopped process) is passed over. Not guaranteed: anything between hosts (state on NFS: set one
NANOGPT_ENV_STATE each) or once files in use are deleted; progress while a process is stopped in the millisecond that it
has the door. Who holds a core and asks for all waits for itself. Without flock (Windows), all this inside a process."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import platform
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from nanogpt_env.content import state_dir
from nanogpt_env.errors import BackendError

# fcntl, not `filelock`: that cannot probe with a shared lock, and empties the file that tells who holds it
if HAS_FLOCK := os.name == "posix":
    import fcntl

FIRST_PAUSE_S, LONGEST_PAUSE_S, STALE_S = 0.001, 0.05, 5.0
_guard = threading.RLock()  # held while forking, so that the child knows every descriptor
_open: weakref.WeakSet[_File] = weakref.WeakSet()
_locked: dict[Any, _File] = {}  # stands in for flock where there is none


class _Note(BaseModel, frozen=True):  # what the holder of a lock writes into its file; garbage reads as the default
    owner: str = "?"
    pid: int = 0
    cores: tuple[int, ...] = ()
    whole: bool = False


class _File(io.FileIO):  # an open file and perhaps the lock on it; closed when forgotten, and in a forked child
    def __init__(self, path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> None:
        with _guard:
            super().__init__(path, "r+", opener=lambda path, _: os.open(path, flags, 0o600))
            _open.add(self)

    def lock(self, shared: bool = False) -> bool:
        if not HAS_FLOCK:
            return (_locked.get if shared else _locked.setdefault)(self.name, self) is self
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        return False

    def put(self, note: _Note) -> None:
        self.seek(0)
        self.truncate(self.write(note.model_dump_json().encode() + b"\n"))

    def close(self) -> None:
        with _guard:
            if HAS_FLOCK and not self.closed:  # closing alone does not unlock while a child is between fork and exec
                fcntl.flock(self, fcntl.LOCK_UN)
            elif not self.closed and _locked.get(self.name) is self:
                del _locked[self.name]
            super().close()


def _in_child() -> None:
    for file in list(_open):
        io.FileIO.close(file)  # without unlocking: the lock is the parent's too
    _guard.release()


if HAS_FLOCK:
    os.register_at_fork(before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_in_child)


class Slot(contextlib.AbstractContextManager["Slot"]):
    """Held until released, by any thread, or forgotten. `core` is the first of `cores`."""

    def __init__(self, file: _File, cores: Sequence[int]) -> None:
        self._file, self.cores, self.core = file, tuple(cores), cores[0]

    def release(self, *_: object) -> None:
        self._file.close()

    __exit__ = release


def usable_cores(groups: Path = Path("/sys/fs/cgroup"), ours: Path = Path("/proc/self/cgroup")) -> list[int]:
    """The cores this process may run on, and no more than the CPU quota of its control groups (v1 and v2) pays for."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    most = max(1, int(min([float(len(cores)), *_quotas(groups, ours)])))
    # containers of one machine see the same numbers: where each begins follows from its name
    first = int.from_bytes(hashlib.sha256(platform.node().encode()).digest()) % len(cores) if most < len(cores) else 0
    return sorted((cores * 2)[first : first + most])


def _quotas(groups: Path, ours: Path) -> Iterator[float]:
    """CPU quota in cores of our control group and all above it, where there is one."""
    for line in ours.read_text().splitlines() if ours.exists() else []:
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "cpu", "cpu,cpuacct"):
            continue
        path = groups / controllers / group.lstrip("/")
        # a container may see its own group as the root, under the host's name
        for folder in {path, *path.parents, groups / controllers}:
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                if controllers:
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if int(quota) > 0:  # -1: none
                    yield int(quota) / int(period)


class Slots:
    """One owner's (environment's) way to the cores; threads may share it. `BackendError` if the folder is unusable."""

    def __init__(self, owner: str, cores: Sequence[int] | None = None, folder: Path | None = None) -> None:
        self.owner, self.cores = owner, tuple(dict.fromkeys(usable_cores() if cores is None else cores))
        if not self.cores:
            raise ValueError("slots need at least one core")
        self.folder = (folder or state_dir() / "slots") / ("" if HAS_FLOCK else f"process-{os.getpid()}")

    def acquire_all(self, timeout: float | None = None, cancelled: Callable[[], bool] = bool) -> Slot:
        """`acquire`, but all cores, others' included: nothing else runs meanwhile."""
        return self.acquire(timeout, cancelled, whole=True)

    def acquire(self, timeout: float | None = None, cancelled: Callable[[], bool] = bool, whole: bool = False) -> Slot:
        """Wait. `TimeoutError` after `timeout` seconds and a few looks, concurrent.futures' `CancelledError` if so."""
        me = _Note(owner=self.owner, pid=os.getpid(), cores=self.cores, whole=whole)
        name = f"wait-{time.time_ns():020d}-{me.pid}-{threading.get_ident()}"  # sorts by time
        until = time.monotonic() + (1e9 if timeout is None else max(timeout, LONGEST_PAUSE_S))
        pause, ticket = FIRST_PAUSE_S, None
        try:
            while not cancelled():
                with self._explained():
                    if (ticket is None or self._turn(name, me)) and (slot := self._take(name, me)):
                        return slot
                    ticket = ticket or _File(self.folder / name)
                    ticket.put(me)  # its time tells that we still look
                    ticket.lock()  # each time, as it fails while another looks
                if time.monotonic() > until:
                    raise TimeoutError(f"{self.owner}: no core in {timeout} s (`nanogpt-env doctor` lists the holders)")
                time.sleep(pause := min(pause * 1.3, LONGEST_PAUSE_S))
            raise CancelledError(f"{self.owner}: the wait for a core was cancelled")
        finally:
            with contextlib.suppress(OSError), ticket or contextlib.nullcontext():
                os.unlink(self.folder / name)

    def status(self) -> list[dict[str, Any]]:
        """A row for every held core, and one with core None for every waiter, as they came."""
        with self._explained():
            files = self._live("all", "core-", "wait-") if self.folder.exists() else {}
        return [
            {"core": core, "owner": note.owner, "pid": note.pid, "exclusive": note.whole}
            for name, note in files.items()
            for core in ([None] if name.startswith("wait-") else note.cores or [-1])
        ]

    def _take(self, name: str, me: _Note) -> Slot | None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _File(self.folder / "door") as door:
            for core in self._turn(name, me) if door.lock() else ():
                with contextlib.ExitStack() as stack:
                    file = stack.enter_context(_File(self.folder / ("all" if me.whole else f"core-{core}")))
                    if file.lock():
                        file.put(note := me if me.whole else me.model_copy(update={"cores": (core,)}))
                        stack.pop_all()
                        return Slot(file, note.cores)
        return None

    def _turn(self, name: str, me: _Note) -> Sequence[int]:
        """The cores that are `me`'s to take now: none while it is somebody else's turn."""
        if self._live("all"):
            return ()
        if not me.whole and not any(file.startswith("wait-") for file in os.listdir(self.folder)):
            return me.cores
        held = self._live("core-")
        free = [core for core in me.cores if f"core-{core}" not in held]
        if not free or (me.whole and held):
            return ()
        waiters = self._live("wait-") | {name: me}
        if alls := [file for file, note in waiters.items() if note.whole]:
            last = path.stat().st_mtime_ns if (path := self.folder / "all").exists() else 0  # written to when granted
            mark = f"wait-{last if last < time.time_ns() else 0:020d}"  # (the clock may have been set back)
            due = {file: note for file, note in waiters.items() if file < mark and not note.whole}
            waiters = due or {min(alls): waiters[min(alls)]}
        rivals, owners = [], [note.owner for note in held.values()]
        for file, note in sorted(item for item in waiters.items() if set(free) & set(item[1].cores)):
            rivals.append((owners.count(note.owner), file))
            owners.append(note.owner)
        return free if name in [file for _, file in sorted(rivals)[: len(free)]] else ()

    def _live(self, *prefixes: str) -> dict[str, _Note]:
        """What is in the files that somebody holds."""
        found = {}
        for name in sorted(name for name in os.listdir(self.folder) if name.startswith(prefixes)):
            with contextlib.suppress(FileNotFoundError), _File(self.folder / name, os.O_RDONLY) as file:
                held = not file.lock(shared=True)
                stale = name.startswith("wait-") and time.time() - os.fstat(file.fileno()).st_mtime > STALE_S
                if held and not stale:
                    found[name] = _Note()
                    with contextlib.suppress(ValidationError):
                        found[name] = _Note.model_validate_json(file.read(65536).partition(b"\n")[0], strict=True)
                elif stale and not held:
                    os.unlink(file.name)
        return found

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            way_out = "set NANOGPT_ENV_STATE to a folder on a local disk that you can write to"
            raise BackendError(f"cannot use the slots in {self.folder}: {error.strerror}; {way_out}") from None

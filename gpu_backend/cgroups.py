"""Limits on memory and processes by control groups (Linux, version 1 or 2), where we may make groups.

They hold what rlimits cannot: the threads of a candidate that runs as root, and memory outside of its address space. A
group's name says who made it, so that those of a killed trainer are found and removed by the next (`reap`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import owner

PREFIX = "nanogpt_env"
LIBRARY_BYTES = 1 << 30  # torch's own pages may be charged to the candidate that touches them first
REMOVE_TIMEOUT_S = 1.0
_NEEDED = ("memory", "pids")
_numbers = itertools.count()


@dataclass
class Group:
    """One group per hierarchy: a single folder in version 2, one for memory and one for processes in version 1."""

    folders: list[Path]

    def add(self, pid: int) -> None:
        """The process with its threads; what it forks later is in, too. Raises `OSError`."""
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(str(pid))

    def out_of_memory(self) -> bool:
        """Whether the kernel has killed something in it for want of memory."""
        for name in ("memory.events", "memory.oom_control"):
            for folder in self.folders:
                with contextlib.suppress(OSError):
                    found = re.search(r"^oom_kill (\d+)$", (folder / name).read_text(), re.MULTILINE)
                    if found and int(found[1]):
                        return True
        return False

    def remove(self) -> bool:
        """Kill what is in it and take it away; False if it is still busy: `reap` tries again."""
        until = time.monotonic() + REMOVE_TIMEOUT_S
        while left := [folder for folder in self.folders if not _removed(folder)]:
            if time.monotonic() > until:
                return False
            for folder in left:
                _kill(folder)
            time.sleep(0.005)
        return True


def create(memory_bytes: int, processes: int) -> Group:
    """A new group, which is empty. `processes`: threads count. Raises `OSError` where none can be made."""
    parents, version, reason = find()
    if not parents:
        raise OSError(reason)
    reap()
    name = f"{PREFIX}-{owner.name()}-{next(_numbers)}"
    group = Group([parent / name for parent in parents])
    limits = {"memory.max": memory_bytes, "memory.swap.max": 0, "pids.max": processes}
    if version == 1:  # the second is for memory and swap together
        limits = {
            "memory.limit_in_bytes": memory_bytes,
            "memory.memsw.limit_in_bytes": memory_bytes,
            "pids.max": processes,
        }
    try:
        for folder in group.folders:
            folder.mkdir()
        for file, value in limits.items():
            for folder in group.folders:
                if (folder / file).exists():  # no swap, no file
                    (folder / file).write_text(str(value))
    except OSError:
        group.remove()
        raise
    return group


def find() -> tuple[list[Path], int, str]:
    """(folders in which groups can be made, version, why there are none)."""
    mounts, own = _mounts(), _own_paths()
    reasons = []
    if "" in mounts:  # version 2
        folder, reason = _usable(mounts[""], own.get("", "/"))
        if folder:
            return [folder], 2, ""
        reasons.append(f"version 2: {reason}")
    if all(name in mounts for name in _NEEDED):
        folders = [_below(mounts[name], own.get(name, "/")) for name in _NEEDED]
        if all(folder and os.access(folder, os.W_OK) for folder in folders):
            return [folder for folder in folders if folder], 1, ""
        reasons.append("version 1: its groups belong to another user")
    return [], 0, "; ".join(reasons) or "no control groups are mounted"


def reap() -> int:
    """Remove the groups of owners that are dead; how many there were."""
    count = 0
    for parent in find()[0]:
        for folder in parent.glob(f"{PREFIX}-*"):
            if owner.is_dead(folder.name.removeprefix(f"{PREFIX}-").rpartition("-")[0]):
                count += Group([folder]).remove()
    return count


def _kill(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / "cgroup.kill").write_text("1")
    with contextlib.suppress(OSError):
        for pid in (folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(pid), signal.SIGKILL)


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _mounts() -> dict[str, tuple[Path, str]]:
    """Mount point and root by controller; '' is version 2."""
    found: dict[str, tuple[Path, str]] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            fields, (kind, _, options) = before.split(), after.split()
            names = [""] if kind == "cgroup2" else options.split(",") if kind == "cgroup" else []
            found |= {name: (Path(fields[4]), fields[3]) for name in names}
    return found


def _own_paths() -> dict[str, str]:
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            found |= dict.fromkeys(names.split(","), path)
    return found


def _below(mount: tuple[Path, str], path: str) -> Path | None:
    """Our own group's folder, as far as it is mounted."""
    relative = os.path.relpath(path, mount[1])
    return None if relative.startswith("..") else mount[0] / relative


def _usable(mount: tuple[Path, str], path: str) -> tuple[Path | None, str]:
    """The nearest group from our own upwards in which groups with limits can be made. A group that holds processes
    cannot have such children, so it is mostly the one above."""
    own = _below(mount, path)
    if own is None:
        return None, "our group is outside of what is mounted"
    if not set(_NEEDED) <= set(_words(mount[0] / "cgroup.controllers")):
        return None, "it does not have the memory and pids controllers"
    for folder in [own, *own.parents]:
        if not folder.is_relative_to(mount[0]):
            break
        if not os.access(folder, os.W_OK):
            continue
        if not set(_NEEDED) <= set(_words(folder / "cgroup.subtree_control")):
            try:
                (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in _NEEDED))
            except OSError:
                continue
        return folder, ""
    return None, "no group that we may write to (try `systemd-run --user --scope -p Delegate=yes COMMAND`)"


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []

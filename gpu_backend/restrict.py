"""Takes rights away from its own process, then runs a host script in it. Runs inside the sandbox, before the candidate.

    python restrict.py landlock HOST LINE_FD [--read PATH]... [--list PATH]...
    python restrict.py filter HOST LINE_SOCKET [--processes]

`landlock`: no namespaces are needed. Files by an allow-list of the kernel's Landlock; the rest by a seccomp filter.
`filter`: in a container, which has namespaces, the filter only; the line to the trainer is a socket with a name, and
what comes first over it is the descriptor for our output. `--processes`: it may start others, compilers for one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import importlib.metadata
import json
import os
import runpy
import socket
import struct
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import host
import seccomp

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_VERSION, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_FILES, _REFER, _TRUNCATE, _IOCTL_DEVICE = (1 << 13) - 1, 1 << 13, 1 << 14, 1 << 15
_OF_A_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE
_TCP, _SCOPES = 0b11, 0b11  # bind and connect; abstract sockets and signals
LEAST_ABI = 3
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
# of /proc/self nothing below net and task: without a namespace of its own that is the host's network
_OWN = ("auxv", "cgroup", "cmdline", "fd", "limits", "maps", "mountinfo", "smaps", "stat", "statm", "status")
_SYSTEM = (
    *(f"/proc/self/{name}" for name in _OWN),
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
    "/sys/devices/system/cpu",
)
_CAPBSET_DROP, _SET_NO_NEW_PRIVS, _CAP_AMBIENT = 24, 38, 47
_CAPABILITY_V3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    return int(_libc.syscall(ctypes.c_long(number), *words))


def abi() -> int:
    """The version of the kernel's Landlock; 0 where there is none, or it is switched off."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(_syscall(_CREATE_RULESET, None, 0, _VERSION), 0)


def allow_only(readable: list[str], listable: list[str]) -> None:
    """From now on this process can read and run what is below `readable`, see names below `listable`, and write to
    nothing but null devices. Raises `OSError`."""
    version = abi()
    if version < LEAST_ABI:
        raise OSError(errno.ENOSYS, f"Landlock's version is {version}, {LEAST_ABI} is needed")
    handled = _FILES | _REFER | _TRUNCATE | (_IOCTL_DEVICE if version >= 5 else 0)
    attributes = struct.pack("=QQQ", handled, _TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = _checked(_syscall(_CREATE_RULESET, attributes, size, 0), "landlock_create_ruleset")
    for path, access in [
        *((p, _EXECUTE | _READ_FILE | _READ_DIR) for p in [*readable, *_SYSTEM]),
        *((p, _READ_DIR) for p in listable),
        *((p, _READ_FILE | _WRITE_FILE | _TRUNCATE) for p in _DEVICES),
    ]:
        with contextlib.suppress(FileNotFoundError, PermissionError):  # what this user may not open, nobody reads
            _allow(rules, path, access)
    _no_new_privileges()
    _checked(_syscall(_RESTRICT_SELF, rules, 0), "landlock_restrict_self")
    os.close(rules)


def _allow(rules: int, path: str, access: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        allowed = access if os.path.isdir(f"/proc/self/fd/{fd}") else access & (_OF_A_FILE | _TRUNCATE)
        if allowed:
            rule = struct.pack("=Qi", allowed, fd)
            _checked(_syscall(_ADD_RULE, rules, _PATH_BENEATH, rule, 0), f"landlock_add_rule {path}")
    finally:
        os.close(fd)


def hide_unreadable() -> None:
    """Make packages whose names alone can be seen fail to import as if they were not there: libraries that can do
    without them, torch for one, are prepared for that and not for a refusal."""
    found: set[str] = set()
    for folder in sys.path:
        names: dict[str, bool] = {}
        entries: list[str] = []
        with contextlib.suppress(OSError):  # our own folder's names cannot be seen
            entries = os.listdir(folder)
        for entry in entries:
            path = os.path.join(folder, entry)
            init = os.path.join(path, "__init__.py")
            name = entry.partition(".")[0]
            names[name] = names.get(name, False) or _readable(init if os.path.exists(init) else path)
        for name in set(names) - found:
            if not names[name]:
                sys.modules[name] = None  # type: ignore[assignment]  # as `import` documents it
        found |= set(names)


def _readable(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError:
        return False
    return True


def _no_new_privileges() -> None:
    """Without it only root may take rights away from itself."""
    _checked(_libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def drop_capabilities() -> None:
    """All of them, for good, if there are any."""
    _no_new_privileges()
    _libc.prctl(_CAP_AMBIENT, 4, 0, 0, 0)
    for capability in range(64):
        _libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0)  # without privilege there is nothing to drop
    _checked(_libc.capset(struct.pack("Ii", _CAPABILITY_V3, 0), bytes(24)), "capset")


def _connect(path: str) -> int:
    """The line to the trainer; our output goes to the descriptor that comes first over it. We say who we are."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.connect(path)
    _, fds, _, _ = socket.recv_fds(line, 1, 1)
    for target in (1, 2):
        os.dup2(fds[0], target)
    os.close(fds[0])
    self_check = {"python": sys.version, "prefix": sys.prefix, "torch": _torch()}
    line.sendall(json.dumps(self_check).encode() + b"\n")
    return line.detach()


def _torch() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["landlock", "filter"])
    parser.add_argument("host")
    parser.add_argument("line")
    parser.add_argument("--read", action="append", default=[])
    parser.add_argument("--list", action="append", default=[])
    parser.add_argument("--processes", action="store_true")
    args = parser.parse_args()
    script = str(Path(__file__).parent / args.host)
    if args.kind == "landlock":
        fd = int(args.line)
        allow_only(args.read, args.list)
        hide_unreadable()
        drop_capabilities()
        host.die_with_parent()  # the filter refuses it later
        seccomp.install(seccomp.program(alone=os.getpid()))
        if not args.host:
            return  # to see whether it works here
        # torch's import wants a folder to write to, and is content with one that is there
        tempfile.tempdir = os.environ["TORCHINDUCTOR_CACHE_DIR"] = "/"
    else:
        fd = _connect(args.line)
        drop_capabilities()
        seccomp.install(seccomp.program(processes=args.processes))
    sys.argv[:] = [script, str(fd)]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()

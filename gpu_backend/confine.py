"""What bubblewrap does for a process that it starts, done by a forked one to itself. Runs inside the sandbox.

`unshare_namespaces`, a fork, then `confine`: afterwards the process is as confined as one that bubblewrap started by
itself. The mounts of the surrounding sandbox are copied; nothing is added to them but empty folders and views of the
process's own namespaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct
from pathlib import Path

import seccomp

_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 0x1000, 0x4000, 1 << 18
_MNT_DETACH = 2
_SET_DUMPABLE, _CAPBSET_DROP, _SET_NO_NEW_PRIVS, _CAP_AMBIENT = 4, 24, 38, 47
_AMBIENT_CLEAR_ALL, _CAPABILITY_V3 = 4, 0x20080522
NOBODY = 65534
CONTROL_FD = 3
INODES = 4096  # of a scratch folder: they are kernel memory

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int | bytes) -> None:
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    if getattr(_libc, name)(*words) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _mount(kind: str, target: str, flags: int, data: str = "") -> None:
    _call("mount", kind.encode(), target.encode(), kind.encode(), flags, data.encode())


def unshare_namespaces() -> None:
    """All but the user's. The next process to be forked is the init of a pid namespace."""
    _call("unshare", _NEWNS | _NEWCGROUP | _NEWUTS | _NEWIPC | _NEWNET | _NEWPID)


def confine(control: int, log: int, report: int, scratch_bytes: int, seccomp_filter: bytes) -> int:
    """Of what this process inherited only the memory is left, and these descriptors: `control` as CONTROL_FD, `log` as
    standard output and error, and `report`, whose new number is returned. Raises `OSError`."""
    os.setsid()
    proc = _mounts(scratch_bytes)
    _user_namespace(proc)
    os.close(proc)
    _drop_capabilities()
    report = _descriptors(control, log, report)
    seccomp.install(seccomp_filter)
    return report


def _mounts(scratch_bytes: int) -> int:
    """Fresh scratch, terminals and /proc, the last read-only; a folder descriptor of a /proc that can be written to.

    They lie over those of the surrounding sandbox. Our user namespace does not own this mount namespace once
    `_user_namespace` is done, so nothing can be taken away again, capabilities or not.
    """
    _call("mount", b"none", b"/", b"", _REC | _PRIVATE, b"")
    _mount("proc", "/proc", _NOSUID | _NODEV | _NOEXEC)
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    _call("umount2", b"/proc", _MNT_DETACH)
    _mount("proc", "/proc", _RDONLY | _NOSUID | _NODEV | _NOEXEC)
    kept = [(p, os.open(p, os.O_PATH)) for p in _mount_points("/tmp/")]  # an interpreter below /tmp
    for scratch in ("/tmp", "/dev/shm"):
        _mount("tmpfs", scratch, _NOSUID | _NODEV, f"size={scratch_bytes},nr_inodes={INODES},mode=0755")
    for path, fd in kept:
        Path(path).mkdir(parents=True, exist_ok=True)
        _call("mount", f"/proc/self/fd/{fd}".encode(), path.encode(), b"", _BIND | _REC, b"")
        os.close(fd)
    _mount("devpts", "/dev/pts", _NOSUID | _NOEXEC, "newinstance,ptmxmode=0666,mode=620")
    os.chdir("/tmp")
    return proc


def _mount_points(below: str) -> list[str]:
    """The outermost ones."""
    found: list[str] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        path = line.split(" ")[4].encode().decode("unicode_escape")  # spaces are \\040
        if path.startswith(below) and not any(path.startswith(f"{outer}/") for outer in found):
            found.append(path)
    return found


def _user_namespace(proc: int) -> None:
    """One of our own, in which we are nobody, and in which no further one can be made."""
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", _NEWUSER)
    settings = {
        "self/setgroups": "deny",
        "self/uid_map": f"{NOBODY} {uid} 1",
        "self/gid_map": f"{NOBODY} {gid} 1",
        "sys/user/max_user_namespaces": "0",
    }
    for path, value in settings.items():
        fd = os.open(path, os.O_WRONLY, dir_fd=proc)
        os.write(fd, value.encode())
        os.close(fd)


def _drop_capabilities() -> None:
    _call("prctl", _CAP_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0)
    for capability in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
        _call("prctl", _CAPBSET_DROP, capability, 0, 0, 0)
    _call("capset", struct.pack("Ii", _CAPABILITY_V3, 0), bytes(24))
    _call("prctl", _SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _SET_DUMPABLE, 1, 0, 0, 0)  # as after exec: our own /proc/self stays ours to read


def _descriptors(control: int, log: int, report: int) -> int:
    """0: nothing; 1, 2: log; CONTROL_FD; and the report's, which is returned. All others are closed."""
    control, log, report = (fcntl.fcntl(fd, fcntl.F_DUPFD, CONTROL_FD + 1) for fd in (control, log, report))
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2), (control, CONTROL_FD)):
        os.dup2(source, target)
    close_all_but({0, 1, 2, CONTROL_FD, report})
    return report


def close_all_but(kept: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(int(name))

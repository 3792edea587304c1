"""A seccomp filter for candidate processes: threads but no new processes, no sockets but AF_UNIX,
and none of the calls that reach other processes, hold memory outside RLIMIT_AS, tell what is in the page cache
or load kernel code.

bubblewrap applies it (`--seccomp FD`). Denied calls fail with EPERM, so honest code that probes for a
feature falls back instead of dying. `clone3` answers ENOSYS because its flags lie behind a pointer that
a filter cannot read; the C library then uses `clone`, whose flags can be checked.
"""

from __future__ import annotations

import errno
import platform
import struct

_LOAD, _JUMP_EQ, _JUMP_GE, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_OFFSET_NR, _OFFSET_ARCH, _OFFSET_ARG0 = 0, 4, 16
_CLONE_THREAD, _AF_UNIX, _PR_SET_PDEATHSIG = 0x00010000, 1, 1
_X32_BIT = 0x40000000

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}
_SOCKET = {"x86_64": 41, "aarch64": 198}
_PRCTL = {"x86_64": 157, "aarch64": 167}
_CLONE3 = 435
# name: (x86_64, aarch64); None where the architecture has no such call
_DENIED: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None),
    "vfork": (58, None),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "mount": (165, 40),
    "unshare": (272, 97),
    "sched_setaffinity": (203, 122),
    "setns": (308, 268),
    "open_by_handle_at": (304, 265),
    # what another process has read of a shared file, and taking it out of memory again
    "mincore": (27, 232),
    "cachestat": (451, 451),
    "preadv2": (327, 286),  # RWF_NOWAIT
    "fadvise64": (221, 223),
}


def _op(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, jump_true, jump_false, k)


def program(machine: str | None = None) -> bytes:
    """The compiled filter. Raises `OSError` on an architecture whose call numbers are not listed."""
    machine = machine or platform.machine()
    if machine not in _AUDIT_ARCH:
        raise OSError(f"no seccomp filter for the {machine} architecture")
    column = 0 if machine == "x86_64" else 1
    denied = [numbers[column] for numbers in _DENIED.values()]
    code = [
        _op(_LOAD, _OFFSET_ARCH),
        _op(_JUMP_EQ, _AUDIT_ARCH[machine], 1, 0),
        _op(_RETURN, _KILL),
        _op(_LOAD, _OFFSET_NR),
        _op(_JUMP_GE, _X32_BIT, 0, 1),
        _op(_RETURN, _ERRNO | errno.EPERM),
        _op(_JUMP_EQ, _CLONE3, 0, 1),
        _op(_RETURN, _ERRNO | errno.ENOSYS),
    ]
    for number in denied:
        if number is not None:
            code += [_op(_JUMP_EQ, number, 0, 1), _op(_RETURN, _ERRNO | errno.EPERM)]
    code += [  # clone: only with CLONE_THREAD
        _op(_JUMP_EQ, _CLONE[machine], 0, 4),
        _op(_LOAD, _OFFSET_ARG0),
        _op(_JUMP_SET, _CLONE_THREAD, 1, 0),
        _op(_RETURN, _ERRNO | errno.EPERM),
        _op(_RETURN, _ALLOW),
    ]
    code += [  # prctl: not the signal that ends the candidate when its trainer dies
        _op(_JUMP_EQ, _PRCTL[machine], 0, 4),
        _op(_LOAD, _OFFSET_ARG0),
        _op(_JUMP_EQ, _PR_SET_PDEATHSIG, 0, 1),
        _op(_RETURN, _ERRNO | errno.EPERM),
        _op(_RETURN, _ALLOW),
    ]
    code += [  # socket: only AF_UNIX
        _op(_JUMP_EQ, _SOCKET[machine], 0, 3),
        _op(_LOAD, _OFFSET_ARG0),
        _op(_JUMP_EQ, _AF_UNIX, 1, 0),
        _op(_RETURN, _ERRNO | errno.EPERM),
        _op(_RETURN, _ALLOW),
    ]
    return b"".join(code)

"""A seccomp filter for candidate processes: threads but no new processes, no sockets but AF_UNIX,
and none of the calls that reach other processes, hold memory outside RLIMIT_AS, tell what is in the page cache,
make others wait, use up what the whole host shares, or load kernel code.

bubblewrap applies it (`--seccomp FD`), or the process itself (restrict.py). Denied calls fail with EPERM, so honest
code that probes for a feature falls back instead of dying. `clone3` answers ENOSYS because its flags lie behind a
pointer that a filter cannot read; the C library then uses `clone`, whose flags can be checked.

Where no namespaces stand between a candidate and the user's other processes, the filter is all there is against what
files do not account for: `alone` names the one process that it may signal, its own.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

_LOAD, _AND, _JUMP_EQ, _JUMP_GE, _JUMP_SET, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_OFFSET_NR, _OFFSET_ARCH, _OFFSET_ARG0 = 0, 4, 16
_CLONE_THREAD, _PR_SET_PDEATHSIG = 0x00010000, 1
_CLONE_NAMESPACES = 0x7E020000
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
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
    "process_madvise": (440, 440),
    # who opens and changes which shared file, and when
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    # counted for the user of the host, or for all of it: whoever takes all leaves others none
    "io_setup": (206, 0),
    "timer_create": (222, 107),
}
# without namespaces: other processes of the user, their IPC objects, and of files what Landlock leaves alone
_DENIED_ALONE: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "process_mrelease": (448, 448),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "setpriority": (141, 140),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "name_to_handle_at": (303, 264),
}
_KILL_CALL = {"x86_64": 62, "aarch64": 129}
_TGKILL = {"x86_64": 234, "aarch64": 131}
_PRLIMIT = {"x86_64": 302, "aarch64": 261}
_SOCKETPAIR = {"x86_64": 53, "aarch64": 199}
_FCNTL, _IOCTL = {"x86_64": 72, "aarch64": 25}, {"x86_64": 16, "aarch64": 29}
_MADVISE = {"x86_64": 28, "aarch64": 233}
# F_SETOWN, F_SETSIG, F_SETOWN_EX: whom a descriptor signals, and with what; F_SETLEASE: who opens the file waits for
# the holder, other users of the host too; F_NOTIFY: who changes something in the folder
_FCNTL_REFUSED = (8, 10, 15, 1024, 1026)
# commands to file systems (flags, versions, attributes; a read-only descriptor is enough) and to sockets
_IOCTL_REFUSED = tuple(kind << 8 for kind in (0x58, 0x66, 0x76, 0x89, 0x94))
_IOCTL_KIND = 0xFF00
_PAGES_OUT = (20, 21)  # MADV_COLD, MADV_PAGEOUT: for all who have the file mapped
_SOCK_STREAM, _SOCK_SEQPACKET, _SOCK_TYPE_MASK = 1, 5, 0xF


def _op(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, jump_true, jump_false, k)


def install(compiled: bytes) -> None:
    """A `program` for this process, for good; needs no_new_privs. Raises `OSError`."""
    libc, set_seccomp, filter_mode = ctypes.CDLL(None, use_errno=True), 22, 2
    buffer = ctypes.create_string_buffer(compiled, len(compiled))
    head = struct.pack("HP", len(compiled) // 8, ctypes.addressof(buffer))
    if libc.prctl(set_seccomp, filter_mode, ctypes.c_char_p(head), 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "seccomp")


def program(machine: str | None = None, alone: int = 0, processes: bool = False) -> bytes:
    """The compiled filter. `alone`: the number of the process that it is for, if that has no namespaces of its own.
    `processes`: for a container with GPUs, whose compilers are programs and whose processes talk by sockets; what they
    can reach is in the container. Raises `OSError` on an architecture whose call numbers are not listed."""
    machine = machine or platform.machine()
    if machine not in _AUDIT_ARCH:
        raise OSError(f"no seccomp filter for the {machine} architecture")
    column = 0 if machine == "x86_64" else 1
    names = [name for name in _DENIED if not (processes and name in ("fork", "vfork"))]
    denied = [numbers[column] for numbers in [*(_DENIED[n] for n in names), *(_DENIED_ALONE.values() if alone else ())]]
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
    if processes:
        code += _when(_CLONE[machine], 0, [_op(_JUMP_SET, _CLONE_NAMESPACES, 0, 1), *_EPERM], _PASS)
    else:
        code += _when(_CLONE[machine], 0, [_op(_JUMP_SET, _CLONE_THREAD, 0, 1), *_PASS], _EPERM)
    # not the signal that ends the candidate when its trainer dies
    code += _when(_PRCTL[machine], 0, [_op(_JUMP_EQ, _PR_SET_PDEATHSIG, 0, 1), *_EPERM], _PASS)
    code += _when(_FCNTL[machine], 1, _refuse(_FCNTL_REFUSED), _PASS)
    code += _when(_IOCTL[machine], 1, [_op(_AND, _IOCTL_KIND), *_refuse(_IOCTL_REFUSED)], _PASS)
    code += _when(_MADVISE[machine], 2, _refuse(_PAGES_OUT), _PASS)
    if alone:
        for call in (_KILL_CALL, _TGKILL):
            code += _when(call[machine], 0, [_op(_JUMP_EQ, alone, 0, 1), *_PASS], _EPERM)
        code += _when(_PRLIMIT[machine], 0, [_op(_JUMP_EQ, 0, 0, 1), *_PASS], _EPERM)
        # a pair of datagram sockets (SOCK_RAW makes one, too) can be made to write to any socket that has a name
        connected = [op for kind in (_SOCK_STREAM, _SOCK_SEQPACKET) for op in (_op(_JUMP_EQ, kind, 0, 1), *_PASS)]
        code += _when(_SOCKETPAIR[machine], 1, [_op(_AND, _SOCK_TYPE_MASK), *connected], _EPERM)
    else:
        families = (_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK) if processes else (_AF_UNIX,)
        code += _when(_SOCKET[machine], 0, [op for f in families for op in (_op(_JUMP_EQ, f, 0, 1), *_PASS)], _EPERM)
    return b"".join([*code, *_PASS])


_EPERM, _PASS = [_op(_RETURN, _ERRNO | errno.EPERM)], [_op(_RETURN, _ALLOW)]


def _refuse(values: tuple[int, ...]) -> list[bytes]:
    return [op for value in values for op in (_op(_JUMP_EQ, value, 0, 1), *_EPERM)]


def _when(number: int, argument: int, checks: list[bytes], otherwise: list[bytes]) -> list[bytes]:
    """For one call: look at the lower half of an argument; the end of `checks` falls through to `otherwise`."""
    body = [_op(_LOAD, _OFFSET_ARG0 + 8 * argument), *checks, *otherwise]
    return [_op(_JUMP_EQ, number, 0, len(body)), *body]

"""Forks candidate processes from one that has torch loaded and never runs a candidate's code. Runs inside the sandbox.

    python zygote.py LINE_FD SCRATCH_BYTES [--bare]

A request on the line names the host to run and brings three descriptors: the candidate's control line, its log, and
the reading end of a pipe whose other end closes with the trainer. The answer goes to the control line: YES with a pidfd
of the process, which is confined by then, or NO with the reason. `--bare` loads nothing, to see whether it works here.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import confine
import host
import seccomp

YES, NO, READY = b"\x01", b"\x00", b"ready"
REPORT_TIMEOUT_S = 20.0
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def main() -> None:
    host.die_with_parent()
    line, scratch_bytes = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    if "--bare" in sys.argv:
        hosts: dict[str, Callable[[socket.socket], object]] = {"rule_host": lambda control: control.recv(1)}
    else:
        host.preload()
        hosts = _hosts()
    gc.freeze()  # else each candidate's first collection copies what all of them share
    line.send(READY)
    if name := _fork_on_request(line, scratch_bytes):
        del line
        sys.argv[1:] = [str(confine.CONTROL_FD)]  # as for a cold start
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed()  # Python's own generator does so by itself, torch's is seeded by the job
        hosts[name](socket.socket(fileno=confine.CONTROL_FD))


def _hosts() -> dict[str, Callable[[socket.socket], object]]:
    import eval_host
    import rule_host
    import train_host

    return {"rule_host": rule_host.serve, "train_host": train_host.serve, "eval_host": eval_host.serve}


def _fork_on_request(line: socket.socket, scratch_bytes: int) -> str:
    """Serve requests until the line ends: ''. In a forked candidate the name of its host."""
    watched: dict[int, int] = {}  # pidfd of a candidate: pipe of its trainer
    while True:
        poller = select.poll()
        poller.register(line, select.POLLIN)
        for pidfd, pipe in watched.items():
            poller.register(pidfd, select.POLLIN)
            poller.register(pipe, 0)  # its end is always reported
        ready = {fd for fd, _ in poller.poll()}
        for pidfd, pipe in list(watched.items()):
            if pipe in ready:
                with contextlib.suppress(ProcessLookupError):  # reaped already
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [])
            if pipe in ready or pidfd in ready:
                del watched[pidfd]
                os.close(pidfd)
                os.close(pipe)
        _reap()
        if line.fileno() not in ready:
            continue
        name, fds, _, _ = socket.recv_fds(line, 64, 3)
        if not name:
            return ""
        control, log, pipe = fds
        if forked := _answer(line, control, log, scratch_bytes):
            watched[forked] = pipe
        elif forked == 0:
            return name.decode()
        else:
            os.close(pipe)


def _answer(line: socket.socket, control: int, log: int, scratch_bytes: int) -> int | None:
    """Fork a candidate: its pidfd, or None where that failed; 0 in the candidate."""
    reason, fds = "", []
    try:
        pid = _fork_confined(line, control, log, scratch_bytes)
        if pid == 0:
            return 0
        fds = [os.pidfd_open(pid)]  # not reaped yet: nobody else can have the number
    except (OSError, RuntimeError) as error:
        reason = str(error)
    os.close(log)
    with socket.socket(fileno=control) as answer, contextlib.suppress(OSError):
        # where it fails the trainer is gone, as its pipe will tell
        socket.send_fds(answer, [NO + reason.encode() if reason else YES], fds)
    return fds[0] if fds else None


def _fork_confined(line: socket.socket, control: int, log: int, scratch_bytes: int) -> int:
    """As `os.fork`, but the child is the init of its own pid namespace and confined. Raises `OSError`."""
    if (threads := len(os.listdir("/proc/self/task"))) != 1:
        raise RuntimeError(f"a process with {threads} threads must not fork")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    between = os.fork()
    if between == 0:
        ours.detach()  # closed by number below; an object would later close what has its number then
        line.detach()
        report = theirs.detach()
        try:
            confine.unshare_namespaces()
            if os.fork():
                os._exit(0)
            report = confine.confine(control, log, report, scratch_bytes, seccomp.program())
            os.write(report, READY)
        except BaseException as error:
            os.write(report, str(error).encode())
            os._exit(1)
        os.close(report)
        return 0
    theirs.close()
    os.waitpid(between, 0)
    with ours:
        ours.settimeout(REPORT_TIMEOUT_S)
        text, ancillary, _, _ = ours.recvmsg(1000, socket.CMSG_SPACE(_CREDENTIALS.size))
    if text != READY:
        raise OSError(text.decode() or "the process ended before it was confined")
    pid: int = _CREDENTIALS.unpack(ancillary[0][2])[0]  # as the kernel translates it into our namespace
    return pid


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    main()

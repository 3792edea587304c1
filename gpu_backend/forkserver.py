"""Forks a trainer per run from a process that has loaded torch, and keeps a zygote for its candidate (zygote.py).

    python forkserver.py LINE_FD [--hide FOLDER]...

Says on the line "ready", or why it cannot fork. Then a request names a track and brings
four descriptors: the trainer's standard streams and a socket for its state. On that we answer FORKED, and at the
trainer's end its exit code; what comes in there, or its end, kills the trainer. When the line ends, all end.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import select
import signal
import socket
import sys
import traceback
from pathlib import Path

import confine
import host
import process
import sandbox
import trainer
import warm

READY, FORKED = b"ready", b"+"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("line", type=int)
    parser.add_argument("--hide", action="append", default=[], help="folder no candidate may see")
    args = parser.parse_args()
    line = socket.socket(fileno=args.line)
    hidden = [trainer.CONTENT, *(Path(p).resolve() for p in args.hide)]
    try:
        zygote = warm.Zygote.launch(hidden)
        trainer.preload()
        zygote.wait()
    except (process.SandboxError, ImportError, OSError) as error:
        line.send(str(error).encode())
        return 0
    gc.freeze()  # else each trainer's first collection copies what all of them share
    line.send(READY)
    track = _fork_on_request(line, zygote)
    if not track:
        zygote.close()
        return 0

    def launch(log_fd: int, script: str) -> process.Process:
        try:
            return zygote.fork(Path(script).stem, log_fd)
        except process.SandboxError as error:
            return sandbox.launch("bubblewrap", hidden, log_fd, script, f"cold start: {error}")

    code = 1
    try:
        code = trainer.serve(trainer.TRACKS[track], launch)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # tearing the interpreter down takes longer than the kernel does


def _fork_on_request(line: socket.socket, zygote: warm.Zygote) -> str:
    """Serve until the line ends, or the zygote and then the last trainer: ''. In a forked trainer its track."""
    runs: dict[int, int] = {}  # pidfd of a trainer: its state socket
    zygote_fd = os.pidfd_open(zygote.launcher.pid)
    accepting = True
    while accepting or runs:
        poller = select.poll()
        for fd in [*runs, *runs.values(), *([line.fileno(), zygote_fd] if accepting else [])]:
            poller.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poller.poll()}
        for pidfd, state in list(runs.items()):
            if pidfd in ready or state in ready:
                del runs[pidfd]
                _end(pidfd, state)
        if zygote_fd in ready:  # whoever asks next sees the end of the line and starts another of us
            accepting = False
            line.close()
        elif accepting and line.fileno() in ready:
            name, fds, _, _ = socket.recv_fds(line, 64, 4)
            if not name:
                break
            if (forked := _fork(line, zygote, fds)) == 0:
                return name.decode()
            runs[forked] = fds[3]
    return ""


def _fork(line: socket.socket, zygote: warm.Zygote, fds: list[int]) -> int:
    """As `os.fork`, but the pidfd instead of the number."""
    if (threads := len(os.listdir("/proc/self/task"))) != 1:
        raise RuntimeError(f"a process with {threads} threads must not fork")
    server = os.getpid()
    if pid := os.fork():
        pidfd = os.pidfd_open(pid)
        for fd in fds[:3]:
            os.close(fd)
        _tell(fds[3], FORKED)
        return pidfd
    host.die_with_parent()
    if os.getppid() != server:
        os._exit(1)  # it died before we asked to be told
    line.detach()  # closed by number below; the object would later close what has its number then
    for standard in range(3):
        os.dup2(fds[standard], standard)
    confine.close_all_but({0, 1, 2, zygote.line.fileno()})
    return 0


def _end(pidfd: int, state: int) -> None:
    """Kill a trainer, if it has not ended, and say how it did."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    assert ended
    _tell(state, str(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status).encode())
    os.close(pidfd)
    os.close(state)


def _tell(state: int, text: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        os.write(state, text)


if __name__ == "__main__":
    sys.exit(main())

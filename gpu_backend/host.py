"""What every candidate process shares: protocol constants, the set-up message, limits. Runs inside the sandbox.

Everything here may be rewritten by the candidate, so the trainer believes nothing that it says.
"""

from __future__ import annotations

import ctypes
import json
import linecache
import mmap
import resource
import signal
import socket
import struct
import sys
import traceback
import types
from typing import Any

FRAME = struct.Struct("<4I")  # (command or status, three arguments)
LENGTH = struct.Struct("<I")  # before the JSON set-up message
LOADED = b"!"  # from a process started for one job, before it takes it
# statuses, from either side
DONE, ERROR, OUT_OF_MEMORY, END = 1, 2, 3, 4
# the trainer asks an update rule
STEP, READOUT, READY_WITH_READOUT, STATE = 10, 11, 12, 13
# training code asks the trainer
BATCH, START, SAVE, DECLARE = 20, 21, 22, 23
# the trainer asks a free model: log-probabilities of the next tokens, or logits over the vocabulary at one position
SCORES, FULL_ROWS = 30, 31
ORDERS = ("stream", "documents")


def send(control: socket.socket, command: int, *arguments: int) -> None:
    control.sendall(FRAME.pack(command, *arguments, *[0] * (3 - len(arguments))))


def receive(control: socket.socket) -> tuple[int, int, int, int] | None:
    """The next frame; None when the trainer has closed the line."""
    data = control.recv(FRAME.size, socket.MSG_WAITALL)
    return FRAME.unpack(data) if len(data) == FRAME.size else None


def arrive() -> socket.socket:
    """What a process does that is started for one job: load what takes long, and say so; the control line."""
    die_with_parent()
    control = socket.socket(fileno=int(sys.argv[1]))
    preload()
    control.sendall(LOADED)
    return control


def preload() -> None:
    import torch

    keep_freed_memory()
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])  # the first optimizer ever made imports torch's compiler: over a second


def begin(control: socket.socket) -> tuple[dict[str, Any], mmap.mmap] | None:
    """Wait for the job, take the limits on: (message, shared memory). None if the trainer closed the line before."""
    import torch

    head, fds, _, _ = socket.recv_fds(control, LENGTH.size, 1)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    message: dict[str, Any] = json.loads(control.recv(length, socket.MSG_WAITALL))
    _limit(message["memory_bytes"], message["threads"], message["gpus"])
    torch.manual_seed(message["seed"])
    return message, mmap.mmap(fds[0], message["shared_bytes"])


def keep_freed_memory() -> None:
    """Have the C library keep what a process frees. By default it gives it back or not as the last thing on the heap
    happens to lie, and a step that gets it anew each time takes up to a fifth longer: docs/design/wallclock.md."""
    m_trim_threshold, m_mmap_threshold, largest = -1, -3, 32 << 20  # malloc.h; glibc refuses more for the second
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(m_trim_threshold, 1 << 30)
        mallopt(m_mmap_threshold, largest)


def page_lock(memory: mmap.mmap) -> None:
    """Have a GPU copy to and from memory directly. Where that is refused, copies take longer, and that is all."""
    import numpy
    import torch

    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch does not type it
    cudart.cudaHostRegister(numpy.frombuffer(memory, numpy.uint8).ctypes.data, len(memory), 0)


def fail(control: socket.socket, error: BaseException) -> None:
    """Print the traceback and tell the trainer."""
    traceback.print_exception(error)
    sys.stderr.flush()
    memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    send(control, OUT_OF_MEMORY if memory else ERROR)


def import_source(name: str, source: str) -> types.ModuleType:
    """Run a candidate's file as module `name`; `import` finds it from then on."""
    file = f"{name}.py"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    module = types.ModuleType(name)
    module.__file__ = file
    sys.modules[name] = module
    exec(compile(source, file, "exec"), module.__dict__)
    return module


def die_with_parent() -> None:
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)


def _limit(memory_bytes: int, threads: int, gpus: bool) -> None:
    """Cap address space (over what torch has mapped already), file sizes, open files, core dumps; and threads in a
    user namespace of our own. 0: not. The kernel does not count root's threads. With GPUs compilers run, and a driver
    that opens a file for everything."""
    if threads:
        resource.setrlimit(resource.RLIMIT_NPROC, (threads, threads))
    with open("/proc/self/statm") if sys.platform.startswith("linux") else open("/dev/null") as statm:
        mapped = int((statm.read().split() or ["0"])[0]) * mmap.PAGESIZE
    if mapped and memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((1 << 30 if gpus else 16 << 20),) * 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, ((4096 if gpus else 64),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if hasattr(resource, "RLIMIT_SIGPENDING"):
        resource.setrlimit(resource.RLIMIT_SIGPENDING, (256, 256))  # counted for the user, as the host sees it

"""Does a backend keep what a backend has to keep? Probes in the place of candidates, watched from outside.

    from nanogpt_env.testing import check_backend
    report = check_backend(LocalBackend("docker"))
    assert report.ok, report

Works for any `Backend` that trains update rules on this host. What a probe says of itself counts only where nothing can
be seen from outside. A backend whose results say `trusted: false` may leave the host open to a candidate; what bounds a
run in time, memory and output, and what ends it, every backend has to hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from nanogpt_env.backends import Backend
from nanogpt_env.judging.conformance import check_judge as check_judge
from nanogpt_env.tiers import load_tier
from nanogpt_env.tracks import StepsTier
from nanogpt_env.trap import EFFECTS, Trap, validation_files
from nanogpt_env.types import Plan, RunResult, SandboxInfo

Outcome = Literal["held", "open", "failed"]
LOG_BYTES = 1 << 18
SCRATCH_BYTES = 64 << 20
THREADS = 512
MEMORY_MIB = 512
STALL_S, END_S = 3.0, 30.0
STARTS = 3

RULE = """
import torch
def configure(params, horizon):
    return torch.optim.SGD(params.values(), lr=0.1)
"""

REACH = """
import ctypes, errno, os, signal, socket, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, act):
    try:
        told = act()
    except BaseException as error:
        print("probe", name, "refused", type(error).__name__, flush=True)
    else:
        print("probe", name, "reached", told or "", flush=True)
def dial(family, kind, address):
    with socket.socket(family, kind) as s:
        s.settimeout(1)
        s.connect(address)
        s.send(TOKEN.encode())
def trace():
    if libc.ptrace(16, BYSTANDER, 0, 0) < 0:
        raise PermissionError
def mount():  # without doing it: who may not is told so before the name is looked at
    if libc.mount(b"none", b"/", b"no such file system", 0, None) < 0 and ctypes.get_errno() == errno.EPERM:
        raise PermissionError
def write(folder):
    with open(os.path.join(folder, TOKEN), "w") as f:
        f.write(TOKEN)
def look(pattern):
    for pid in os.listdir("/proc"):
        try:
            with open(f"/proc/{pid}/environ") as f:
                print(*[word for word in f.read().split(chr(0)) if pattern in word], flush=True)
        except OSError:
            pass
def spawn(prefix):
    subprocess.Popen([*prefix, sys.executable, "-c", "import time; time.sleep(600)", TOKEN], start_new_session=True)
INET, INET6, UNIX = socket.AF_INET, socket.AF_INET6, socket.AF_UNIX
STREAM, DATAGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
attempt("tcp", lambda: dial(INET, STREAM, ("127.0.0.1", PORTS["tcp"])))
attempt("udp", lambda: dial(INET, DATAGRAM, ("127.0.0.1", PORTS["udp"])))
attempt("tcp6", lambda: dial(INET6, STREAM, ("::1", PORTS["tcp6"])))
attempt("udp6", lambda: dial(INET6, DATAGRAM, ("::1", PORTS["udp6"])))
attempt("abstract socket", lambda: dial(UNIX, STREAM, chr(0) + TOKEN))
attempt("named socket", lambda: dial(UNIX, STREAM, NAMED))
attempt("route", lambda: dial(INET, DATAGRAM, ("192.0.2.53", 53)))
for folder in FOLDERS:
    attempt("write " + folder, lambda: write(folder))
attempt("read", lambda: open(VICTIM).read())
attempt("truncate", lambda: os.truncate(VICTIM, 0))
attempt("chmod", lambda: os.chmod(VICTIM, 0o777))
attempt("date", lambda: os.utime(VICTIM, (0, 0)))
attempt("content", lambda: [path for path in CONTENT if open(path, "rb").read(4)][0])
attempt("environment", lambda: (print(os.environ), look("NANOGPT_ENV_")))
attempt("see", lambda: open(f"/proc/{BYSTANDER}/stat").read().split()[21])
attempt("ptrace", trace)
attempt("signal", lambda: os.kill(BYSTANDER, signal.SIGTERM))
attempt("mount", mount)
attempt("spawn", lambda: spawn([]))
attempt("spawn and detach", lambda: spawn(["setsid", "-f"]))
"""

# what a rule does in its third step
MEMORY = "held = [torch.ones(1 << 24) for _ in range(MEMORY_MIB // 16)]"
FOREVER = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True:
    pass
"""
FLOOD = 'for _ in range(1 << 15):\n    print("\\x1b[2Jx" * 200)'
MANY = """
import threading, time
count = 0
try:
    while count < 2000:
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        count += 1
except RuntimeError:
    pass
print("probe threads", count, flush=True)
"""
FILL = """
import os
total = 0
for folder in FOLDERS:
    try:
        with open(os.path.join(folder, TOKEN), "wb", buffering=0) as f:
            while total < 1 << 28 and (written := f.write(bytes(1 << 20))):
                total += written
    except OSError:
        pass
print("probe written", total, flush=True)
"""


@dataclass(frozen=True)
class Check:
    """`open`: it did not hold, and the backend does not say that it would (`trusted: false`)."""

    name: str
    outcome: Outcome
    detail: str = ""


@dataclass(frozen=True)
class Conformance:
    """What `check_backend` found. `start_s`: seconds of whole runs of 4 steps."""

    sandbox: SandboxInfo
    checks: tuple[Check, ...]
    start_s: tuple[float, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Nothing failed; what is open is not a failure."""
        return all(check.outcome != "failed" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return {"sandbox": self.sandbox.model_dump(), "ok": self.ok, "start_s": self.start_s,
                "checks": [asdict(check) for check in self.checks]}  # fmt: skip

    def __str__(self) -> str:
        rows = [f"{check.outcome:7} {check.name}: {check.detail}" for check in self.checks if check.outcome != "held"]
        held = sum(check.outcome == "held" for check in self.checks)
        return "\n".join([f"{self.sandbox.name}: {held} of {len(self.checks)} held", *rows])


def check_backend(
    backend: Backend, quick: bool = False, on_check: Callable[[str], None] = lambda _: None
) -> Conformance:
    """Run the probes, one after the other; ten runs, `quick`: two. `on_check` gets the name of each. Raises
    `BackendError` if the backend itself fails. The backend is left open."""
    tier = load_tier("nano-steps", calibrated=False)
    assert isinstance(tier, StepsTier)
    with Trap(validation_files(tier.corpus_folder())) as trap:
        checker = _Checker(backend, tier, trap, on_check)
        checker.reach()
        if not quick:
            checker.limits()
        checker.starts(1 if quick else STARTS)
    assert checker.sandbox
    return Conformance(checker.sandbox, tuple(checker.checks), tuple(checker.start_s))


class _Checker:
    def __init__(self, backend: Backend, tier: StepsTier, trap: Trap, on_check: Callable[[str], None]) -> None:
        self.backend, self.tier, self.trap, self.on_check = backend, tier, trap, on_check
        self.checks: list[Check] = []
        self.start_s: list[float] = []
        self.sandbox: SandboxInfo | None = None

    def run(self, name: str, source: str, cancel_after: float = 0.0, **limits: float) -> tuple[RunResult, float]:
        """Train a few steps by a rule of this source, after the facts; the seconds that it took, from the cancellation
        if there is one."""
        self.on_check(name)
        sources = {"optimizer.py": self.trap.source(source, MEMORY_MIB=4 * MEMORY_MIB)}
        job = self.tier.job(sources, Plan(steps=4, horizon=4), "1", ("val_public",))
        began = time.monotonic()
        run = self.backend.start(job.model_copy(update={"limits": job.limits.model_copy(update=limits)}))
        if cancel_after:
            time.sleep(cancel_after)
            began = time.monotonic()
            run.cancel()
        result = run.result(600)
        self.sandbox = result.sandbox
        return result, time.monotonic() - began

    def note(self, name: str, holds: bool, detail: str, always: bool = False) -> None:
        """`always`: what every backend has to hold."""
        assert self.sandbox
        outcome: Outcome = "held" if holds else "failed" if always or self.sandbox.trusted else "open"
        self.checks.append(Check(name, outcome, "" if holds else detail))

    def ended(self) -> None:
        left = self.trap.left()
        self.note("nothing is left running", not left, f"processes {left}", True)

    def reach(self) -> None:
        """What a candidate can get at."""
        result, _ = self.run("reach", RULE + REACH, setup_s=60)
        ran = result.completed and "probe spawn" in result.log
        self.note("the probes ran", ran, f"{result.exit_reason}: {result.detail}", True)
        self.ended()
        found = self.trap.effects(result.log)
        for name in EFFECTS:
            self.note(name, name not in found, found.get(name, ""))

    def limits(self) -> None:
        """What a candidate can use up."""
        result, _ = self.run("memory", _third_step(MEMORY), memory_bytes=MEMORY_MIB << 20)
        ends = ("candidate_memory", "candidate_exited", "candidate_error")
        self.note("memory", result.exit_reason in ends, f"{4 * MEMORY_MIB} MiB were had: {result.exit_reason}", True)
        result, seconds = self.run("time", _third_step(FOREVER), stall_s=STALL_S)
        right = result.exit_reason == "candidate_stalled" and seconds < STALL_S + END_S
        self.note("time", right, f"{result.exit_reason} after {seconds:.0f} s", True)
        result, _ = self.run("output", _third_step(FLOOD))
        size = len(result.log.encode())
        self.note("output", size <= LOG_BYTES and "\x1b" not in result.log, f"a log of {size} bytes", True)
        result, _ = self.run("threads", _third_step(MANY))
        count = _number(result.log, "threads")
        self.note("threads", count <= THREADS, f"{count} threads")
        result, _ = self.run("disk", _third_step(FILL))
        written = _number(result.log, "written")
        self.note("disk", written <= SCRATCH_BYTES, f"{written >> 20} MiB were written")
        result, seconds = self.run("cancel", f"{RULE}\nimport time\ntime.sleep(600)", cancel_after=1.0, setup_s=600)
        right = result.exit_reason == "cancelled" and seconds < END_S
        self.note("cancel", right, f"{result.exit_reason} after {seconds:.0f} s", True)
        self.ended()

    def starts(self, count: int) -> None:
        for _ in range(count):  # after others, which loaded what these find
            result, seconds = self.run("start", RULE)
            self.start_s.append(round(seconds, 3))
        self.note("an honest rule trains", result.completed, f"{result.exit_reason}: {result.detail}", True)


def _third_step(body: str) -> str:
    """A rule that does this in its third step."""
    lines = "\n".join("        " + line for line in body.strip().splitlines())
    return f"{RULE}\ndef schedule(step, horizon, optimizers):\n    if step == 2:\n{lines}\n"


def _number(log: str, name: str) -> int:
    """What a probe says of itself; beyond all limits if it does not."""
    words = next((line.split() for line in log.splitlines() if line.startswith(f"probe {name} ")), None)
    return int(words[2]) if words else 1 << 60

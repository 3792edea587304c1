"""Whole GPUs for runs, shared by all processes of one user on one host. No run shares a GPU with another of ours."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nanogpt_env.content import state_dir
from nanogpt_env.errors import BackendError
from nanogpt_env.locking import locked
from nanogpt_env.slots import Slots

QUERY_TIMEOUT_S = 20.0


def usable_gpus() -> list[str]:
    """Identifiers of the GPUs that this process may use: CUDA_VISIBLE_DEVICES, else all that the driver lists. Numbers
    are translated, as the driver names processes by identifier."""
    known = dict(line.split(", ", 1) for line in _query("--query-gpu=index,uuid") if ", " in line)
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return list(known.values())
    return [known.get(name.strip(), name.strip()) for name in visible.split(",") if name.strip()]


def others_processes(gpus: Sequence[str]) -> list[str]:
    """What runs on these GPUs, whoever's it is: 'GPU, process number, name'."""
    return [line for line in _query("--query-compute-apps=gpu_uuid,pid,process_name") if line.startswith(tuple(gpus))]


def states(gpus: Sequence[str]) -> list[str]:
    """How these GPUs are: identifier, MHz of processors and memory, degrees, watts, what holds the clocks down."""
    wanted = "uuid,clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_throttle_reasons.active"
    return [line for line in _query(f"--query-gpu={wanted}") if line.startswith(tuple(gpus))]


def _query(question: str) -> list[str]:
    try:
        done = subprocess.run(
            ["nvidia-smi", question, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=QUERY_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def check_idle(gpus: Sequence[str]) -> None:
    """Raises `BackendError` if somebody else's process is on one of ours."""
    if busy := others_processes(gpus):
        raise BackendError(f"a GPU is in use by a process that is not ours: {'; '.join(busy)}")


class Gpus:
    """One owner's (environment's) way to the GPUs of this host."""

    def __init__(self, owner: str, gpus: Sequence[str] | None = None, folder: Path | None = None) -> None:
        self.owner, self._gpus = owner, None if gpus is None else tuple(gpus)
        self._folder = folder or state_dir() / "gpus"

    @property
    def gpus(self) -> tuple[str, ...]:
        if self._gpus is None:
            self._gpus = tuple(usable_gpus())  # asked when first needed: it takes a second
        return self._gpus

    @contextlib.contextmanager
    def acquire(self, count: int, cancelled: Callable[[], bool] = bool) -> Iterator[tuple[str, ...]]:
        """Wait for `count` of them: their identifiers. Raises `BackendError` if there are not so many, or somebody
        else's process is on one; concurrent.futures' `CancelledError`."""
        if count == 0:
            yield ()
            return
        if count > len(self.gpus):
            raise BackendError(
                f"a run of this tier takes {count} GPU(s) and this host offers {len(self.gpus)}: `nanogpt-env doctor`"
            )
        slots = Slots(self.owner, range(len(self.gpus)), self._folder)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            # one chooses at a time, or two would wait for each other's halves
            with locked(self._folder / "choosing.lock", cancelled):
                numbers = [held.enter_context(slots.acquire(cancelled=cancelled)).core for _ in range(count)]
            chosen = tuple(self.gpus[i] for i in numbers)
            check_idle(chosen)
            yield chosen

"""The trainers that train one run together, a device each: ranks. Alone, nothing here does anything.

Each has the whole model and its share of every batch's rows; it drives a rule of its own, in a sandbox of its own, on
its shards of the parameters. Only trainers speak to each other (torch.distributed): there is no line between sandboxes.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from candidate import RunFailed

T = TypeVar("T")
END_TIMEOUT_S = 10.0


class Ranks:
    """The rank that this process is, of `size`. All must call the same methods in the same order."""

    def __init__(self, rank: int = 0, size: int = 1, store: str = "", timeout_s: float = 600.0) -> None:
        """`store`: a file that all ranks of the run can open; it need not exist."""
        self.rank, self.size = rank, size
        self._dist: Any = None
        if size > 1:
            self._dist = importlib.import_module("torch.distributed")  # takes long, and most runs have one rank
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            self._dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(seconds=timeout_s),
            )

    def close(self) -> None:
        if self.size > 1:
            self._dist.destroy_process_group()

    def mine(self, count: int) -> range:
        """This rank's share of so many things, in one piece. Raises ValueError if they cannot be shared out evenly."""
        if count % self.size:
            raise ValueError(f"{count} cannot be shared out among {self.size} ranks evenly")
        share = count // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def together(self, act: Callable[[], T]) -> T:
        """What `act` returns here. Where it fails on a rank, that `RunFailed` is raised on all: else the others would
        wait for one that has given up."""
        if self.size == 1:
            return act()
        failure, found = None, None
        try:
            found = act()
        except RunFailed as error:
            failure = error
        first = self.least(self.size if failure is None else self.rank)
        if first < self.size:
            told = [[failure.reason, str(failure)] if failure else None]
            self._dist.broadcast_object_list(told, src=first)
            assert told[0]
            raise RunFailed(*told[0])
        return found  # type: ignore[return-value]  # it is what act returned

    def mean_(self, *tensors: Tensor) -> None:
        """Of each the mean over the ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                self._dist.all_reduce(tensor)
                tensor /= self.size

    def sum(self, value: float) -> float:
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        self._dist.all_reduce(total)
        return float(total)

    def least(self, value: int) -> int:
        """The least over the ranks."""
        if self.size == 1:
            return value
        found = torch.tensor(value)
        self._dist.all_reduce(found, self._dist.ReduceOp.MIN)
        return int(found)

    def share_(self, parts: list[Tensor]) -> None:
        """Every rank gets all parts, from those whose `mine` they are."""
        if self.size > 1:
            each = len(parts) // self.size
            for i, part in enumerate(parts):
                self._dist.broadcast(part, src=i // each)


@contextlib.contextmanager
def others(size: int, arguments: list[str], job: str) -> Iterator[str]:
    """The further ranks of a run as processes of `trainer.py`, started with `arguments` and given the job, a line of
    JSON. The context's value is the store. They end with it, and with this process."""
    with tempfile.TemporaryDirectory(prefix="nanogpt_env-ranks-") as folder:
        store = os.path.join(folder, "store")
        started = []
        try:
            for rank in range(1, size):
                command = [sys.executable, sys.argv[0], *arguments, "--rank", str(rank), "--store", store]
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
                started.append(process)
                assert process.stdin
                process.stdin.write(job)
                process.stdin.flush()
            yield store
        finally:
            for process in started:
                assert process.stdin
                with contextlib.suppress(OSError):
                    process.stdin.close()  # they take it as the end
            for process in started:
                try:
                    process.wait(END_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    process.kill()  # its sandbox dies with it
                    process.wait()

"""The trainer's side of the update rule: shared memory, one status frame per request, time limits.

The candidate's process holds parameters and gradients in memory it shares with us and may scribble on
them at any time. So we copy parameters out once, after it says it is done and before every forward pass,
read each status frame once, and measure its time by our own clocks.
"""

from __future__ import annotations

import mmap
import time
from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import host
from candidate import Candidate, Limits, RunFailed
from process import Process

WINDOW = 20  # steps over which rule time is compared with forward + backward
WINDOW_MIN = 5


class Flat:
    """A model whose parameters and gradients are views of two flat float32 tensors, shard after shard. A shard's
    parameters are updated without sight of the others."""

    def __init__(self, model: nn.Module, shards: int = 1) -> None:
        named = list(model.named_parameters())
        device, total = named[0][1].device, sum(p.numel() for _, p in named)
        self.params, self.gradients = torch.empty(total, device=device), torch.zeros(total, device=device)
        self.shards: list[list[dict[str, Any]]] = []
        self.bounds: list[slice] = []
        offset = 0
        for members in partition([p.numel() for _, p in named], shards):
            begin = offset
            self.shards.append([])
            for name, p in (named[i] for i in members):
                part = slice(offset, offset + p.numel())
                self.params[part] = p.detach().flatten()
                p.data = self.params[part].view(p.shape)
                p.grad = self.gradients[part].view(p.shape)
                entry = {"name": name, "shape": list(p.shape), "numel": p.numel(), "offset": offset}
                self.shards[-1].append(entry)
                offset += p.numel()
            self.bounds.append(slice(begin, offset))

    def parts(self, flat: Tensor) -> list[Tensor]:
        """A flat tensor's views by shard."""
        return [flat[part] for part in self.bounds]


def partition(sizes: list[int], shards: int) -> list[list[int]]:
    """Indices by shard, in order: the largest first, each to the shard that has least. Raises ValueError if a shard
    would be empty."""
    if not 1 <= shards <= len(sizes):
        raise ValueError(f"{len(sizes)} tensors cannot be split into {shards} shards")
    members: list[list[int]] = [[] for _ in range(shards)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        min(members, key=lambda shard: sum(sizes[j] for j in shard)).append(i)
    return [sorted(shard) for shard in members]


class Rule(Protocol):
    """What the training loop needs of an update rule, isolated or (in benchmarks) in-process."""

    has_readout: bool

    def step(self, step: int, forward_backward_s: float) -> None: ...

    def readout(self) -> Tensor: ...


class IsolatedRule:
    """Drives a rule host in its sandbox, on shards `own` of the parameters. All waits are bounded; every fault is a
    `RunFailed`. On a GPU what is exchanged goes through host memory (`device`: where the rule has its own copy)."""

    def __init__(
        self,
        process: Process,
        flat: Flat,
        source: str,
        horizon: int,
        seeds: list[int],
        limits: Limits,
        own: range | None = None,
        device: str = "",
        state: bytes = b"",
        state_room: int = 0,
    ) -> None:
        """`seeds`: one a shard. `state`: from an earlier process's `state`, which has `state_room` bytes for it."""
        own = range(len(flat.shards)) if own is None else own
        self.flat, self.limits = flat, limits
        self.part = slice(flat.bounds[own[0]].start, flat.bounds[own[-1]].stop)
        count = self.part.stop - self.part.start
        self.total_rule_s = self.total_forward_backward_s = 0.0
        self._window: deque[list[float]] = deque(maxlen=WINDOW)  # seconds of the rule, and ours, by step
        self._charged_step = 0
        section = -(-count * 4 // mmap.PAGESIZE) * mmap.PAGESIZE
        self.line = Candidate(process, limits, 3 * section + state_room)
        self._state, self._first = 3 * section, True
        self.line.memory[self._state : self._state + len(state)] = state
        self._params, self._gradients, self._readout = (
            torch.frombuffer(self.line.memory, dtype=torch.float32, count=count, offset=i * section) for i in range(3)
        )
        if flat.params.is_cuda:
            host.page_lock(self.line.memory)
        self._params.copy_(flat.params[self.part])
        sections = {"params": 0, "gradients": section, "readout": 2 * section, "state": self._state}
        shards = [[{**e, "offset": e["offset"] - self.part.start} for e in flat.shards[i]] for i in own]
        own_seeds = [seeds[i] for i in own]
        job = {"shards": shards, "seeds": own_seeds, "seed": own_seeds[0], "source": source, "horizon": horizon}
        self.line.set_up({**sections, **job, "device": device, "state_bytes": len(state)})
        status = self.line.receive(limits.setup_s)[0]
        if status not in (host.DONE, host.READY_WITH_READOUT):
            raise RunFailed("candidate_protocol", f"unexpected answer {status} to the set-up")
        self.has_readout = status == host.READY_WITH_READOUT
        flat.params[self.part].copy_(self._params)
        self._used = self._used_seconds()

    def _used_seconds(self) -> float:
        """CPU time; on a GPU, which the process shares with ours in turn, the time that we waited for it."""
        return self.line.waited if self.flat.params.is_cuda else self.line.cpu_seconds()

    def step(self, step: int, forward_backward_s: float) -> None:
        """Hand over the gradients, wait for the update, copy the parameters out."""
        self._gradients.copy_(self.flat.gradients[self.part])
        # the first step may allocate state and compile, within what is left of the set-up allowance
        set_up = self.line.started + self.limits.setup_s - time.monotonic()
        first, self._first = self._first, False
        self._ask(host.STEP, step, max(set_up, 0.0) if first else self.limits.stall_s)
        self.flat.params[self.part].copy_(self._params)
        if first:
            self._used = self._used_seconds()
            return
        self._window.append([0.0, 0.0])
        self._charge(step, forward_backward_s)

    def readout(self) -> Tensor:
        """Flat parameters to evaluate: the candidate's averaged weights, or the current ones. Of other ranks' shards
        the current ones in any case."""
        if not self.has_readout:
            return self.flat.params
        self._ask(host.READOUT, 0, self.limits.stall_s)
        copied = self.flat.params.clone()
        copied[self.part].copy_(self._readout)
        if self._window:
            self._charge(self._charged_step, 0.0)  # with the step before it
        return copied

    def state(self) -> bytes:
        """What a new process needs to go on, from the candidate: to be kept unread. Empty if it cannot say."""
        size = self._ask(host.STATE, 0, self.limits.stall_s)
        if size > len(self.line.memory) - self._state:
            raise RunFailed("candidate_protocol", f"a state of {size} bytes, for which there is no room")
        return bytes(self.line.memory[self._state : self._state + size])

    def _charge(self, step: int, forward_backward_s: float) -> None:
        """Add the rule's time since the last charge to the last step; refuse a window that is over the cap."""
        before, self._used, self._charged_step = self._used, self._used_seconds(), step
        self.total_rule_s += self._used - before
        self.total_forward_backward_s += forward_backward_s
        self._window[-1][0] += self._used - before
        self._window[-1][1] += forward_backward_s
        if len(self._window) < WINDOW_MIN:
            return
        rule, ours = (sum(column) for column in zip(*self._window, strict=True))
        if rule > self.limits.rule_time * ours:
            n = len(self._window)
            raise RunFailed(
                "rule_too_slow",
                f"at step {step} the rule's time over the last {n} steps was {rule / ours:.2f} "
                f"times that of forward + backward ({1e3 * rule / n:.1f} ms against "
                f"{1e3 * ours / n:.1f} ms a step); the tier allows {self.limits.rule_time:g} times",
            )

    def _ask(self, command: int, step: int, timeout: float) -> int:
        self.line.send(command, step)
        status, argument, *_ = self.line.receive(timeout)
        if status != host.DONE:
            raise RunFailed("candidate_protocol", f"unexpected answer {status}")
        return argument

"""Runs inside the sandbox: loads the candidate's optimizer.py and applies it when the trainer asks.

A candidate defines (docs/candidate.md):

    configure(params, horizon)            -> torch.optim.Optimizer, or a list of them       required
    init(params)                          set initial values in place                       optional
    schedule(step, horizon, optimizers)   called before each step, sets learning rates      optional
    readout(params, optimizers)           -> {name: tensor} to evaluate instead (EMA)       optional
"""

from __future__ import annotations

import contextlib
import linecache
import mmap
import socket
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import host


def serve(control: socket.socket) -> None:
    """One job, to its end."""
    begun = host.begin(control)
    if begun is None:
        return
    message, shared = begun
    try:
        rule = _Rule(message, shared)
    except BaseException as error:  # whatever the candidate raises ends its run, SystemExit too
        host.fail(control, error)
        return
    host.send(control, host.READY_WITH_READOUT if rule.readout else host.DONE)
    _answer(control, rule)


def _answer(control: socket.socket, rule: _Rule) -> None:
    while frame := host.receive(control):
        command, step, *_ = frame
        if command == host.STATE:
            host.send(control, host.DONE, rule.write_state())
            continue
        try:
            rule.step(step) if command == host.STEP else rule.write_readout()
        except BaseException as error:
            host.fail(control, error)
            return
        host.send(control, host.DONE)


class _Rule:
    """The candidate's module, bound to each of its shards of the parameters in turn. With several of them, each has its
    own state of torch's generator: what it draws does not depend on which others are in this process."""

    def __init__(self, message: dict[str, Any], shared: mmap.mmap) -> None:
        import torch

        if message["device"].startswith("cuda"):
            host.page_lock(shared)
        source = message["source"]
        module = types.ModuleType("optimizer")
        sys.modules["optimizer"] = module  # dataclasses look their module up
        linecache.cache["optimizer.py"] = (len(source), None, source.splitlines(True), "optimizer.py")
        exec(compile(source, "optimizer.py", "exec"), module.__dict__)
        self.torch, self.module, self.message, self.shared = torch, module, message, shared
        self.generators: list[Any] = []
        self.shards: list[_Shard] = []
        if message["state_bytes"]:  # go on with these, whatever `init` makes of them
            params = shared[message["params"] : message["gradients"]]
        for entries, seed in zip(message["shards"], message["seeds"], strict=True):
            if len(message["shards"]) > 1:
                torch.manual_seed(seed)
            self.shards.append(_Shard(module, message, entries, shared))
            self.generators.append(torch.get_rng_state())
        self.readout = self.shards[0].readout
        if message["state_bytes"]:
            import rule_state

            shared[message["params"] : message["gradients"]] = params
            for shard in self.shards:
                shard.fetch()
            state = shared[message["state"] : message["state"] + message["state_bytes"]]
            self.generators = rule_state.restore(state, module, self.shards)

    def write_state(self) -> int:
        """Its bytes; 0 if it cannot be kept, or is too large."""
        import rule_state

        try:
            state = rule_state.dump(self.module, self.shards, self.generators, self.message["device"])
        except Exception as error:
            print(f"this rule's state cannot be kept, so a run that is killed begins anew: {error!r}", file=sys.stderr)
            return 0
        room = len(self.shared) - self.message["state"]
        if len(state) > room:
            print(f"this rule's state has {len(state)} bytes, too many to be kept ({room})", file=sys.stderr)
            return 0
        self.shared[self.message["state"] : self.message["state"] + len(state)] = state
        return len(state)

    def step(self, step: int) -> None:
        for i, shard in enumerate(self.shards):
            with self._generator(i):
                shard.step(step)

    def write_readout(self) -> None:
        for i, shard in enumerate(self.shards):
            with self._generator(i):
                shard.write_readout()

    @contextlib.contextmanager
    def _generator(self, i: int) -> Iterator[None]:
        if len(self.shards) == 1:
            yield
            return
        self.torch.set_rng_state(self.generators[i])
        yield
        self.generators[i] = self.torch.get_rng_state()


class _Shard:
    """A module's hooks on some parameters, with gradients and readout in shared memory; where `device` is given, the
    parameters that the module works on are copies there."""

    def __init__(
        self, module: types.ModuleType, message: dict[str, Any], entries: list[dict[str, Any]], shared: mmap.mmap
    ) -> None:
        import torch

        def view(section: str, entry: dict[str, Any]) -> Any:
            offset = message[section] + 4 * entry["offset"]
            flat = torch.frombuffer(shared, dtype=torch.float32, count=entry["numel"], offset=offset)
            return flat.view(entry["shape"])

        self.torch, self.horizon, self.device = torch, message["horizon"], message["device"]
        self.stored = {e["name"]: view("params", e) for e in entries}
        self.gradients = {e["name"]: view("gradients", e) for e in entries}
        self.out = {e["name"]: view("readout", e) for e in entries}
        self.params = {n: torch.nn.Parameter(self._placed(t)) for n, t in self.stored.items()}
        hooks: list[Callable[..., Any] | None] = [
            getattr(module, name, None) for name in ("init", "configure", "schedule", "readout")
        ]
        init, configure, self.schedule, self.readout = hooks
        if configure is None:
            raise TypeError("optimizer.py must define configure(params, horizon)")
        if init:
            with torch.no_grad():
                init(self.params)
        made = configure(self.params, self.horizon)
        self.optimizers = list(made) if isinstance(made, (list, tuple)) else [made]
        for optimizer in self.optimizers:
            if not callable(getattr(optimizer, "step", None)):
                kind = type(optimizer).__name__
                raise TypeError(f"configure must return a torch.optim.Optimizer or a list of them, not {kind}")
        self._store()

    def step(self, step: int) -> None:
        for name, parameter in self.params.items():
            parameter.grad = self._placed(self.gradients[name])  # again: zero_grad may have dropped it
        if self.schedule:
            self.schedule(step, self.horizon, self.optimizers)
        for optimizer in self.optimizers:
            optimizer.step()
        self._store()

    def _placed(self, tensor: Any) -> Any:
        return tensor.to(self.device, copy=True) if self.device else tensor

    def _store(self) -> None:
        """A rule may have rebound `p.data`; the trainer reads only the shared bytes."""
        for name, parameter in self.params.items():
            if parameter.data_ptr() != self.stored[name].data_ptr():
                self.stored[name].copy_(parameter.detach())

    def fetch(self) -> None:
        """The parameters as the trainer has them."""
        with self.torch.no_grad():
            for name, parameter in self.params.items():
                if parameter.data_ptr() != self.stored[name].data_ptr():
                    parameter.copy_(self.stored[name])

    def write_readout(self) -> None:
        assert self.readout is not None
        with self.torch.no_grad():
            values = self.readout(self.params, self.optimizers)
            for name, out in self.out.items():
                out.copy_(values.get(name, self.params[name]))


if __name__ == "__main__":
    serve(host.arrive())

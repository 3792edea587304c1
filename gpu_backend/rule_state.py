"""An update rule's state as bytes, and back: so that a run that was killed goes on in a new process.

Runs inside the sandbox. The trainer keeps the bytes and never looks into them. What is kept: all attributes of the
optimizers, the module's own data, and the generators of random numbers. Parameters are the trainer's.
"""

from __future__ import annotations

import io
import pickle
import random
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch

_CODE = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, names: dict[int, str]) -> None:
        super().__init__(file)
        self.names = names

    def persistent_id(self, value: Any) -> str | None:
        return self.names.get(id(value))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, objects: dict[str, Any]) -> None:
        super().__init__(file)
        self.objects = objects

    def persistent_load(self, name: str) -> Any:
        return self.objects[name]


def _objects(shards: Sequence[Any]) -> dict[str, Any]:
    """What is not copied but referred to, in the new process as in the old one."""
    found: dict[str, Any] = {}
    for i, shard in enumerate(shards):
        found |= {f"parameter {i} {name}": p for name, p in shard.params.items()}
        found |= {f"optimizer {i} {j}": optimizer for j, optimizer in enumerate(shard.optimizers)}
    return found


def _data(module: types.ModuleType) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if not k.startswith("__") and not isinstance(v, _CODE)}


def dump(module: types.ModuleType, shards: Sequence[Any], generators: Any, device: str) -> bytes:
    """`generators`: of each shard; `device`: where the rule computes. Raises whatever a pickler raises for what cannot
    be pickled."""
    file = io.BytesIO()
    numpy = sys.modules.get("numpy")
    state = {
        "module": _data(module),
        "optimizers": [[vars(optimizer) for optimizer in shard.optimizers] for shard in shards],
        "generators": generators,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if device.startswith("cuda") else [],
        "random": random.getstate(),
        "numpy": numpy.random.get_state() if numpy else None,
    }
    _Pickler(file, {id(value): name for name, value in _objects(shards).items()}).dump(state)
    return file.getvalue()


def restore(data: bytes, module: types.ModuleType, shards: Sequence[Any]) -> Any:
    """The generators that `dump` was given."""
    state = _Unpickler(io.BytesIO(data), _objects(shards)).load()
    vars(module).update(state["module"])
    for shard, attributes in zip(shards, state["optimizers"], strict=True):
        for optimizer, saved in zip(shard.optimizers, attributes, strict=True):
            vars(optimizer).update(saved)
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["random"])
    if state["numpy"] is not None:
        sys.modules["numpy"].random.set_state(state["numpy"])
    return state["generators"]

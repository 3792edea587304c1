"""Read a candidate's checkpoint: safetensors bytes, checked against a layout before anything is loaded.

The layout is the tier's own model's, or what the candidate declared before its training.
A refusal is one of the fixed `CODES`: the bytes are the candidate's, and no text of theirs goes further.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import safetensors
import safetensors.torch
from torch import Tensor

MAX_HEADER_BYTES = 1 << 20
# bytes per value of the dtypes that a checkpoint may have
DTYPES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
CODES = {
    "header": "the header is no safetensors header of at most 1 MiB",
    "names": "it does not have exactly the model's tensors",
    "dtype": "a tensor's dtype is not one of float64, 32, 16 and bfloat16, or not the declared one",
    "shape": "a tensor's shape is not the model's",
    "layout": "the tensors do not fill the data section one after the other",
    "undeclared": "a free model needs speedrun.declare(state) before start()",
    "declaration": "the declaration does not name 1 to 4096 tensors with their dtypes and shapes",
    "size": "the declared tensors are larger than the tier allows",
}
MAX_TENSORS, MAX_NAME, MAX_DIMENSIONS = 4096, 200, 8

Layout = Mapping[str, tuple[int, ...]]
"""shape of every tensor, by name"""


class CheckpointError(ValueError):
    def __init__(self, code: str) -> None:
        super().__init__(f"checkpoint refused ({code}): {CODES[code]}")
        self.code = code


def max_bytes(layout: Layout) -> int:
    """Room that a checkpoint of this layout may need at most, whatever its dtypes."""
    data = sum(math.prod(shape) * max(DTYPES.values()) for shape in layout.values())
    return data + 8 + sum(len(name) + 200 for name in layout)


@dataclass(frozen=True)
class Declaration:
    layout: Layout
    dtypes: Mapping[str, str]


def declaration(text: bytes, data_bytes: int) -> Declaration:
    """Read `{name: [dtype, shape]}` for at most `data_bytes` of data. Raises `CheckpointError`."""
    entries = _json(text, "declaration")
    if not 1 <= len(entries) <= MAX_TENSORS or max(map(len, entries)) > MAX_NAME or "__metadata__" in entries:
        raise CheckpointError("declaration")
    layout: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for name, entry in entries.items():
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise CheckpointError("declaration")
        dtype, shape = entry
        if dtype not in DTYPES:
            raise CheckpointError("dtype")
        if not _is_shape(shape) or len(shape) > MAX_DIMENSIONS:
            raise CheckpointError("declaration")
        layout[name], dtypes[name] = tuple(shape), dtype
    if sum(math.prod(shape) * DTYPES[dtypes[name]] for name, shape in layout.items()) > data_bytes:
        raise CheckpointError("size")
    return Declaration(layout, dtypes)


def load(data: bytes, layout: Layout) -> dict[str, Tensor]:
    """Tensors by name, as float32. Raises `CheckpointError`."""
    check(data, layout)
    try:
        return {name: tensor.float() for name, tensor in safetensors.torch.load(data).items()}
    except safetensors.SafetensorError:  # it asks for more than `check` does
        raise CheckpointError("header") from None


def check(data: bytes, layout: Layout, dtypes: Mapping[str, str] | None = None) -> None:
    """Raises `CheckpointError` unless these are the tensors of `layout`, of these dtypes if any are given."""
    header = _header(data)
    if set(header) != set(layout):
        raise CheckpointError("names")
    allowed = {name: (dtypes[name],) if dtypes else tuple(DTYPES) for name in layout}
    spans = sorted(_span(entry, layout[name], allowed[name]) for name, entry in header.items())
    ends = [0, *(end for _, end in spans)]
    if [start for start, _ in spans] != ends[:-1] or len(data) != 8 + _header_bytes(data) + ends[-1]:
        raise CheckpointError("layout")


def _header_bytes(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _header(data: bytes) -> dict[str, object]:
    size = _header_bytes(data)
    if len(data) < 8 or size > min(MAX_HEADER_BYTES, len(data) - 8):
        raise CheckpointError("header")
    header = _json(data[8 : 8 + size], "header")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise CheckpointError("header")
    return header


def _json(text: bytes, code: str) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        found = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise CheckpointError(code) from None
    if not isinstance(found, dict):
        raise CheckpointError(code)
    return found


def _span(entry: object, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> tuple[int, int]:
    """(start, end) in the data section, whose length is what dtype and shape ask for."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError("header")
    given, offsets = entry["dtype"], entry["data_offsets"]
    if not isinstance(given, str) or given not in dtypes:
        raise CheckpointError("dtype")
    if not _is_shape(entry["shape"]) or tuple(entry["shape"]) != shape:
        raise CheckpointError("shape")
    if not _is_shape(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[given]:
        raise CheckpointError("layout")
    return offsets[0], offsets[1]


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 40 for n in value)

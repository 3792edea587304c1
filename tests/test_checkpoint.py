"""A checkpoint is read only if it is exactly what the model holds; anything else has a fixed code."""

import json

import pytest
import torch
from safetensors.torch import save

import checkpoint

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}
LAYOUT = {"a": (2, 3), "b": (4,)}


def code(data):
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(data, LAYOUT)
    assert caught.value.code in checkpoint.CODES
    return caught.value.code


def packed(header, data=b"\0" * 40):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_fits_is_loaded_as_float32(dtype):
    data = save({name: t.to(dtype) for name, t in STATE.items()}, metadata={"format": "pt"})
    assert len(data) <= checkpoint.max_bytes(LAYOUT)
    loaded = checkpoint.load(data, LAYOUT)
    assert all(torch.equal(loaded[name], t) and loaded[name].dtype == torch.float32 for name, t in STATE.items())


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({}, "names"),
        ({"a": STATE["a"]}, "names"),
        ({**STATE, "c": torch.ones(1)}, "names"),
        ({**STATE, "b": torch.ones(5)}, "shape"),
        ({**STATE, "a": torch.ones(3, 2)}, "shape"),
        ({**STATE, "b": torch.ones(4, dtype=torch.int64)}, "dtype"),
    ],
)
def test_other_tensors_are_refused(state, expected):
    assert code(save(state)) == expected


@pytest.mark.parametrize("notes", [5, None, [], {"format": 1}, {"format": None}])
def test_notes_that_the_loader_does_not_take_are_refused_before(notes):
    assert code(packed(GOOD | {"__metadata__": notes})) == "header"


GOOD = {"a": entry([2, 3], 0, 24), "b": entry([4], 24, 40)}


def test_the_hand_made_one_is_good():
    assert set(checkpoint.load(packed(GOOD), LAYOUT)) == {"a", "b"}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "header"),
        (b"\0" * 7, "header"),
        (b"\xff" * 8, "header"),
        (packed(b"[1]"), "header"),
        (packed(b"{"), "header"),
        (packed(b"[" * 100_000), "header"),
        (packed(b'{"a": 1' + b"0" * 5000 + b"}"), "header"),
        (packed(json.dumps(GOOD)[:-1].encode() + b', "b": ' + json.dumps(GOOD["b"]).encode() + b"}"), "header"),
        (packed({**GOOD, "b": 3}), "header"),
        (packed({**GOOD, "b": {**entry([4], 24, 40), "more": 1}}), "header"),
        (packed({**GOOD, "b": entry([4], 24, 40, dtype=["F32"])}), "dtype"),
        (packed({**GOOD, "b": entry([4.0], 24, 40)}), "shape"),
        (packed({**GOOD, "b": entry([True] * 4, 24, 40)}), "shape"),
        (packed({**GOOD, "b": entry([4], 0, 16)}), "layout"),  # over another tensor
        (packed({**GOOD, "b": entry([4], 28, 44)}, b"\0" * 44), "layout"),  # a gap
        (packed({**GOOD, "b": entry([4], 24, 44)}, b"\0" * 44), "layout"),
        (packed({**GOOD, "b": entry([4], -16, 0)}), "layout"),
        (packed({**GOOD, "b": entry([4], 1 << 70, (1 << 70) + 16)}), "layout"),
        (packed(GOOD, b"\0" * 41), "layout"),
        (packed(GOOD, b"\0" * 39), "layout"),
    ],
)  # fmt: skip
def test_malicious_bytes_are_refused(data, expected):
    assert code(data) == expected


# --- declarations of free models ---

DECLARED = {"a": ["F32", [2, 3]], "b": ["BF16", [4]]}


def test_a_checkpoint_is_held_to_its_declaration():
    declared = checkpoint.declaration(json.dumps(DECLARED).encode(), 32)
    state = {"a": STATE["a"], "b": STATE["b"].bfloat16()}
    checkpoint.check(save(state), declared.layout, declared.dtypes)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.check(save(STATE), declared.layout, declared.dtypes)
    assert caught.value.code == "dtype"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "declaration"),
        (b"[]", "declaration"),
        (b"{}", "declaration"),
        (b"\xff{}", "declaration"),
        (b"[" * 100_000, "declaration"),
        (b'{"a": ["F32", [1]], "a": ["F32", [1]]}', "declaration"),
        ({"a": 1}, "declaration"),
        ({"a": [["F32"], [1]]}, "declaration"),
        ({"a": ["F32", [1], 1]}, "declaration"),
        ({"a": ["F32", [-1]]}, "declaration"),
        ({"a": ["F32", [True]]}, "declaration"),
        ({"a": ["F32", [1] * 9]}, "declaration"),
        ({"a" * 201: ["F32", [1]]}, "declaration"),
        ({"__metadata__": ["F32", [1]]}, "declaration"),
        ({str(i): ["F32", []] for i in range(4097)}, "declaration"),
        ({"a": ["I64", [1]]}, "dtype"),
        ({"a": ["F32", [9]]}, "size"),
        ({"a": ["F32", [4]], "b": ["F32", [5]]}, "size"),
        ({"a": ["F32", [1 << 39] * 8]}, "size"),
    ],
)
def test_malicious_declarations_are_refused(text, expected):
    data = text if isinstance(text, bytes) else json.dumps(text).encode()
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.declaration(data, 32)
    assert caught.value.code == expected

"""Whatever an agent sends becomes one of the eleven actions or an `ActionError`, by one path."""

import json
import math

import numpy as np
import pytest

from nanogpt_env import actions as act
from nanogpt_env import spaces
from nanogpt_env.actions import parse_action, to_flat
from nanogpt_env.errors import ActionError

EXAMPLES = [
    act.ReadFile(),
    act.ReadFile(path="task.md"),
    act.WriteFile(path="optimizer.py", text="x = 1\n"),
    act.WriteFile(path="optimizer.py", text=""),
    act.EditFile(path="optimizer.py", old="a", new="b"),
    act.EditFile(path="optimizer.py", old="a", new=""),
    act.ApplyPatch(patch="--- a\n+++ b\n"),
    act.Revert(),
    act.Revert(snapshot="ab12"),
    act.Run(),
    act.Run(horizon=300),
    act.Run(horizon=300, steps=200, seed=7, wait=False),
    act.Poll(handle="run-1"),
    act.Cancel(handle="run-1"),
    act.Submit(),
    act.Submit(claim=250, horizon=300),
    act.Note(text="lr 3e-3 diverges"),
    act.Stop(),
]


def flat(**fields):
    """A sample of the action space with nothing used but `fields`."""
    texts = dict.fromkeys(("path", "text", "old", "handle"), "")
    integers = dict.fromkeys(("steps", "horizon", "claim", "seed"), 0)
    return {"type": 0, "wait": 1} | texts | integers | fields


def number(name):
    return act.ACTION_NAMES.index(name)


@pytest.mark.parametrize("action", EXAMPLES, ids=lambda a: a.type)
def test_every_form_is_the_same_action(action):
    fields = action.model_dump()
    short = {"type": action.type} | action.model_dump(exclude_defaults=True)
    forms = [action, fields, short, json.dumps(fields), json.dumps(short).encode(), action.model_dump_json()]
    for form in forms:
        parsed = parse_action(form)
        assert parsed == action
        assert type(parsed) is type(action)


@pytest.mark.parametrize("action", EXAMPLES, ids=lambda a: a.type)
def test_the_flat_form_goes_there_and_back(action):
    form = to_flat(action)
    assert parse_action(form) == action
    assert parse_action(json.dumps(form)) == action
    assert form in spaces.action_space()
    numpy_form = {k: np.int64(v) if isinstance(v, int) else v for k, v in form.items()}
    assert parse_action(numpy_form) == action


def test_the_examples_are_of_every_type():
    assert {type(a) for a in EXAMPLES} == set(act.ACTION_TYPES)
    assert len(act.ACTION_NAMES) == 11


def test_parsing_leaves_the_callers_dict_alone():
    form = flat(type=number("run"), steps=5)
    before = dict(form)
    parse_action(form)
    assert form == before


def test_a_float_number_of_steps_is_fine_if_it_is_whole():
    assert parse_action({"type": "run", "steps": 200.0}) == act.Run(steps=200)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(object(), id="object"), None, 5, 1.5, math.nan, True, [], [{"type": "stop"}], ("stop",), {"stop"},
        bytearray(b"{}"), act.Run,
        "", "stop", "{", "[]", "null", "5", '"stop"', "NaN", '{"type": "stop"', '{"type": "stop"} x', "\ud800", "\0",
        b"", b"\xff\xfe", b"\x80", b'{"type": "stop"', b"\x00" * 10,
        '{"a":' * 100_000, "[" * 100_000, '{"type": "run", "steps": ' + "9" * 5000 + "}",
        " " * (act.MAX_ACTION_BYTES + 1), b" " * (act.MAX_ACTION_BYTES + 1),
    ],
    ids=lambda raw: repr(raw)[:25],
)  # fmt: skip
def test_what_is_no_object_is_refused(raw):
    with pytest.raises(ActionError):
        parse_action(raw)


@pytest.mark.parametrize(
    "raw",
    [
        {}, {"typ": "stop"}, {"type": ""}, {"type": "Stop"}, {"type": "stop "}, {"type": "shell"}, {"type": "\ud800"},
        {"type": "x" * 10**6}, {"type": "stop", "now": 1}, {"type": "stop", 1: 2}, {"type": "stop", "\ud800": 1},
        {1: 2}, {"type": "read_file", "path": 5}, {"type": "read_file", "path": None}, {"type": "write_file"},
        {"type": "write_file", "path": "optimizer.py"}, {"type": "write_file", "path": "optimizer.py", "text": None},
        {"type": "edit_file", "path": "optimizer.py", "old": "a"}, {"type": "apply_patch"}, {"type": "poll"},
        {"type": "cancel", "handle": 1}, {"type": "note"}, {"type": "note", "text": ["a"]},
        {"type": "revert", "snapshot": 0}, {"type": "run", "steps": 0}, {"type": "run", "steps": -1},
        {"type": "run", "steps": 10**9 + 1}, {"type": "run", "steps": 10**5000}, {"type": "run", "steps": 1.5},
        {"type": "run", "steps": math.nan}, {"type": "run", "steps": math.inf}, {"type": "run", "steps": "many"},
        {"type": "run", "steps": []}, {"type": "run", "seed": -1}, {"type": "run", "seed": act.MAX_SEED + 1},
        {"type": "run", "wait": "maybe"}, {"type": "run", "wait": None}, {"type": "run", "claim": 5},
        {"type": "submit", "claim": 0}, {"type": "submit", "claim": math.nan}, {"type": "submit", "steps": 5},
        {"type": "submit", "horizon": {}}, {"type": "submit", "seed": 1},
    ],
    ids=lambda raw: repr(raw)[:40] if "steps" not in raw or raw["steps"] != 10**5000 else "huge",
)  # fmt: skip
def test_wrong_fields_are_refused_and_named(raw):
    with pytest.raises(ActionError) as caught:
        parse_action(raw)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("raw", "named"),
    [({"type": "run", "steps": -1}, "run.steps"), ({"type": "note"}, "note.text"), ({"type": "shell"}, "read_file"),
     ([], "list"), ("{", "JSON"), (flat(type=99), "type"), (flat(type=9, gpu=1), "gpu")],
)  # fmt: skip
def test_the_refusal_names_what_was_wrong(raw, named):
    with pytest.raises(ActionError, match=named):
        parse_action(raw)


@pytest.mark.parametrize(
    "raw",
    [
        # -1 would be the last type, `stop`, if it were taken as an index
        flat(type=-1), flat(type=-11), flat(type=11), flat(type=10**30), flat(type=10**5000), flat(type=None),
        flat(type=math.inf), flat(type=-math.inf), flat(type=math.nan), flat(type=5.7), flat(type=b"run"),
        flat(type=[5]), flat(type=np.array([5, 6])), flat(type=5, steps=math.inf), flat(type=5, steps=math.nan),
        flat(type=5, steps=1.5), flat(type=5, steps="9" * 5000), flat(type=5, steps=None), flat(type=5, steps=-1),
        flat(type=5, wait=math.inf), flat(type=5, wait=None), flat(type=5, path=np.array(["a", "b"])),
        flat(type=5, text="x"), flat(type=5, claim=1), flat(type=8, steps=1), flat(type=8, wait=0),
        flat(type=10, path="x"), flat(type=10, other=1), flat(type=10) | {1: 1}, flat(type=10) | {10**5000: 1},
        flat(type=10) | {"\ud800": 1}, flat(type=2, new="x"), flat(type=3, patch="x"), {"type": 1, "path": 5},
        {"type": 5}, {"type": 10, "wait": 1}, '{"type": 5, "steps": Infinity}',
        '{"type": 1e999}', '{"type": -1}', '{"type": null}',
    ],
    ids=lambda raw: repr(raw)[:30] if isinstance(raw, str) else None,
)  # fmt: skip
def test_a_wrong_flat_dict_is_refused(raw):
    with pytest.raises(ActionError):
        parse_action(raw)


@pytest.mark.parametrize("field", ["claim", "horizon"])
def test_true_is_no_number(field):
    with pytest.raises(ActionError, match="not true or false"):
        parse_action({"type": "submit", field: True})


def test_an_empty_flat_sample_is_an_action_but_never_an_edit_by_accident():
    """Texts that an action requires may be empty, as to_flat writes them."""
    assert parse_action(flat(type=number("write_file"), path="optimizer.py")) == act.WriteFile(
        path="optimizer.py", text=""
    )


def test_seed_zero_cannot_be_said_in_the_flat_form():
    """0 means "not given" there; JSON can say it."""
    assert parse_action({"type": "run", "seed": 0}).seed == 0
    assert parse_action(to_flat(act.Run(seed=0))).seed is None


@pytest.mark.parametrize("seed", range(4))
def test_random_samples_never_do_anything(seed):
    space = spaces.action_space()
    space.seed(seed)
    kinds = set()
    for _ in range(500):
        sample = space.sample()
        kinds.add(int(sample["type"]))
        assert sample in space
        with pytest.raises(ActionError):
            parse_action(sample)
    assert kinds == set(range(11))


def test_a_text_of_the_full_size_is_in_the_space():
    space = spaces.action_space()
    form = to_flat(act.WriteFile(path="optimizer.py", text="é\n" * (spaces.MAX_TEXT // 2)))
    assert form in space
    assert form | {"text": "x" * (spaces.MAX_TEXT + 1)} not in space
    assert form | {"text": b"x"} not in space


def test_actions_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        act.Run().steps = 5

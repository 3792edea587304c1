"""The actions of an agent, and the one path by which a model, a dict or JSON text becomes one."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from nanogpt_env.errors import ActionError
from nanogpt_env.types import Record

MAX_ACTION_BYTES = 1 << 20
MAX_SEED = 2**31 - 1


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number, not true or false")
    return value


PositiveSteps = Annotated[int, Field(ge=1, le=10**9), BeforeValidator(_no_truth)]


class ReadFile(Record):
    """Show a file of the workspace. The empty path lists the files."""

    type: Literal["read_file"] = "read_file"
    path: str = ""


class WriteFile(Record):
    """Replace a file's whole text."""

    type: Literal["write_file"] = "write_file"
    path: str
    text: str


class EditFile(Record):
    """Replace `old`, which must occur exactly once, by `new`."""

    type: Literal["edit_file"] = "edit_file"
    path: str
    old: str
    new: str


class ApplyPatch(Record):
    """Apply a unified diff; every hunk must fit exactly, or nothing changes."""

    type: Literal["apply_patch"] = "apply_patch"
    patch: str


class Revert(Record):
    """Back to an earlier snapshot of this episode (hash or its beginning), or to the start record."""

    type: Literal["revert"] = "revert"
    snapshot: str = ""


class Run(Record):
    """Train the workspace once. `horizon` is the schedule length told to the rule, `steps` where the
    trainer stops (default: the horizon). With `wait=False` the answer is a handle for Poll and Cancel."""

    type: Literal["run"] = "run"
    horizon: PositiveSteps | None = None
    steps: PositiveSteps | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED), BeforeValidator(_no_truth)] | None = None
    wait: bool = True


class Poll(Record):
    """Where a run stands; its result when it is done."""

    type: Literal["poll"] = "poll"
    handle: str


class Cancel(Record):
    """End a run. What it used is charged."""

    type: Literal["cancel"] = "cancel"
    handle: str


class Submit(Record):
    """Claim that the workspace reaches the target within `claim` steps of a schedule of `horizon` steps.
    Without a claim, the smallest one that your own runs at this horizon make likely to be accepted."""

    type: Literal["submit"] = "submit"
    claim: PositiveSteps | None = None
    horizon: PositiveSteps | None = None


class Note(Record):
    """Append to notes.md. Costs nothing and is no part of a snapshot."""

    type: Literal["note"] = "note"
    text: str


class Stop(Record):
    """End the episode."""

    type: Literal["stop"] = "stop"


Action = ReadFile | WriteFile | EditFile | ApplyPatch | Revert | Run | Poll | Cancel | Submit | Note | Stop

ACTION_TYPES: tuple[type[Action], ...] = (
    ReadFile, WriteFile, EditFile, ApplyPatch, Revert, Run, Poll, Cancel, Submit, Note, Stop,
)  # fmt: skip
ACTION_NAMES = tuple(t.model_fields["type"].default for t in ACTION_TYPES)

_ADAPTER: TypeAdapter[Action] = TypeAdapter(Annotated[Action, Field(discriminator="type")])


def tool_schemas() -> dict[str, tuple[str, dict[str, Any]]]:
    """By the name of each action: what it does and the JSON schema of its fields, as tool-calling models take them."""
    found = {}
    for action in ACTION_TYPES:
        schema = action.model_json_schema()
        fields = {key: _plain(field) for key, field in schema["properties"].items()}
        name = fields.pop("type")["const"]
        parameters = {"type": "object", "properties": fields, "required": schema.get("required", [])}
        found[name] = " ".join(schema["description"].split()), parameters
    return found


def _plain(field: dict[str, Any]) -> dict[str, Any]:
    """A field's schema without titles and null: what may be left out is not required."""
    field = next((f for f in field.get("anyOf", ()) if f["type"] != "null"), field)
    return {key: value for key, value in field.items() if key != "title"}


def describe_actions() -> str:
    """The actions, one a line, with their fields; those that may be left out in brackets."""
    lines = []
    for name, (text, schema) in tool_schemas().items():
        fields = [f if f in schema["required"] else f"[{f}]" for f in schema["properties"]]
        lines.append(f"- {name}({', '.join(fields)}): {text}")
    return "\n".join(lines)


# Fields of the flat dict in `action_space` -> fields of an action. "" and 0 mean "not given".
_FLAT_TEXT = ("path", "text", "old", "handle")
_FLAT_INTEGER = ("steps", "horizon", "claim", "seed")
_TEXT_FIELD = {"edit_file": "new", "apply_patch": "patch", "revert": "snapshot"}


def parse_action(raw: Any) -> Action:
    """An action from a model, a dict (`{"type": "run", ...}` or one of `action_space`) or JSON text.

    Raises `ActionError`, which names what was wrong, on anything else.
    """
    if isinstance(raw, ACTION_TYPES):
        return raw
    if isinstance(raw, (str, bytes)):
        raw = _from_json(raw)
    if not isinstance(raw, Mapping):
        raise ActionError(
            f"an action is a model, a dict or JSON text, not {type(raw).__name__}; "
            'for example {"type": "read_file", "path": "task.md"}'
        )
    fields = dict(raw)
    if not isinstance(fields.get("type", ""), str):
        fields = _from_flat(fields)
    try:
        return _ADAPTER.validate_python(fields)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in e['loc']) or 'action'}: {e['msg']}" for e in error.errors()[:5]
        )
        raise ActionError(f"not a valid action: {problems[:1000]}. Types: {', '.join(ACTION_NAMES)}") from None


def _from_json(text: str | bytes) -> Any:
    if len(text) > MAX_ACTION_BYTES:
        raise ActionError(f"an action may have {MAX_ACTION_BYTES} characters, this has {len(text)}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ActionError(f"an action in text form must be one JSON object: {error}") from None


def _from_flat(flat: dict[str, Any]) -> dict[str, Any]:
    """The dict of `action_space` without its unused fields. Any used field that the action does not
    have is kept, so that validation refuses it: random samples never start a run."""
    try:
        index = operator.index(flat.pop("type"))
        if not 0 <= index < len(ACTION_NAMES):
            raise ValueError(f"type must be in 0..{len(ACTION_NAMES) - 1}")
        if missing := {*_FLAT_TEXT, *_FLAT_INTEGER, "wait"} - flat.keys():
            raise ValueError(
                f"{', '.join(sorted(missing))} missing; an action by name, {{'type': 'run'}}, may be short"
            )
        name = ACTION_NAMES[index]
        fields: dict[str, Any] = {"type": name}
        for key in _FLAT_TEXT:
            if value := flat.pop(key):
                fields[_TEXT_FIELD.get(name, key) if key == "text" else key] = value
        for key in _FLAT_INTEGER:
            if number := operator.index(flat.pop(key)):
                fields[key] = number
        if not operator.index(flat.pop("wait")):
            fields["wait"] = False
        if flat:
            raise ActionError(f"unknown fields: {', '.join(map(str, flat))[:1000]}")
    except (TypeError, ValueError) as error:
        raise ActionError(f"not a dict of the action space: {error}") from None
    required = [k for k, f in ACTION_TYPES[ACTION_NAMES.index(name)].model_fields.items() if f.is_required()]
    return {**dict.fromkeys(required, ""), **fields}


def to_flat(action: Action) -> dict[str, Any]:
    """The dict of `action_space` that means the same as `action`."""
    fields = action.model_dump()
    flat: dict[str, Any] = {"type": ACTION_NAMES.index(fields.pop("type")), "wait": 1}
    flat |= dict.fromkeys(_FLAT_TEXT, "") | dict.fromkeys(_FLAT_INTEGER, 0)
    text_field = _TEXT_FIELD.get(action.type, "text")
    for key, value in fields.items():
        if value is not None:
            flat["text" if key == text_field else key] = int(value) if key == "wait" else value
    return flat

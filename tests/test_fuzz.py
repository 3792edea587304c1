"""Whatever bytes come in, a parser has an answer of its own: a value that keeps its promises, or its own error."""

from __future__ import annotations

import json
import shutil
import socket
import types

import pytest
import torch
from conftest import TINY
from episodes import CLAIM, FAST, do
from fakes import FakeBackend, hidden_losses
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from nanogpt_env import ActionError, LedgerError, Note, Run, Speedrun, TierError, WriteFile
from nanogpt_env.actions import ACTION_TYPES, parse_action
from nanogpt_env.ledger import read_ledger
from nanogpt_env.replay import Replay, replay
from nanogpt_env.tiers import load_tier
from nanogpt_env.workspace import Workspace

import checkpoint
import host
from candidate import Candidate, Limits, RunFailed

settings.register_profile(
    "here",
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
settings.load_profile("here")

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
NAMES = [t.model_fields["type"].default for t in ACTION_TYPES]
FIELDS = ["path", "text", "old", "new", "patch", "snapshot", "steps", "horizon", "seed", "claim", "wait", "handle"]


@st.composite
def mutated(draw, data):
    """Bytes with a few of them changed, cut out or put in."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(found)))
        kind = draw(st.sampled_from(["change", "cut", "insert", "end"]))
        if kind == "insert":
            found[at:at] = draw(st.binary(max_size=12))
        elif kind == "cut":
            del found[at : at + draw(st.integers(1, 40))]
        elif kind == "end":
            del found[at:]
        elif at < len(found):
            found[at] = draw(st.integers(0, 255))
    return bytes(found)


# --- actions, paths, patches ---


@given(st.one_of(JSON, st.text(), st.binary(), st.dictionaries(st.sampled_from([*FIELDS, "type"]), JSON)))
def test_anything_is_an_action_or_refused(raw):
    try:
        assert isinstance(parse_action(raw), ACTION_TYPES)
    except ActionError as error:
        assert len(str(error)) < 3000


@given(st.sampled_from(NAMES), st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_an_action_of_any_fields_is_one_or_refused(name, fields):
    try:
        assert parse_action(json.dumps({"type": name, **fields}, default=str)).type == name
    except ActionError:
        pass


def workspace():
    return Workspace({"optimizer.py": "a = 1\nb = 2\nc = 3\n"}, {"task.md": "task"}, 1000)


@given(
    st.one_of(
        st.text(),
        st.sampled_from(
            ["../optimizer.py", "/etc/passwd", "./optimizer.py", "optimizer.py\0", "OPTIMIZER.PY", "task.md"]
        ),
        st.text("./\\\0:~").map(lambda s: s + "optimizer.py"),
    ),
    st.text(max_size=2000),
)
def test_only_the_candidates_file_can_be_written(path, text):
    w = workspace()
    try:
        w.write(path, text)
        assert path == "optimizer.py" and len(text.encode()) <= 1000
    except ActionError:
        assert w.files == workspace().files
    assert set(w.files) == {"optimizer.py"} and w.frozen == {"task.md": "task"}


PATCH = b"--- a/optimizer.py\n+++ b/optimizer.py\n@@ -1,3 +1,3 @@\n a = 1\n-b = 2\n+b = 5\n c = 3\n"


@given(st.one_of(mutated(PATCH), st.binary(max_size=200)))
def test_a_patch_fits_or_changes_nothing(data):
    w = workspace()
    try:
        assert w.patch(data.decode("utf-8", "replace")) == ["optimizer.py"]
    except ActionError:
        assert w.files == workspace().files
    assert set(w.files) == {"optimizer.py"} and len(w.files["optimizer.py"].encode()) <= 1000


@given(JSON, JSON, JSON)
def test_a_workspaces_state_is_taken_whole_or_not_at_all(files, notes, snapshots):
    w = workspace()
    try:
        w.load({"files": files, "notes": notes, "snapshots": snapshots})
        assert set(w.files) == {"optimizer.py"}
    except ActionError:
        assert w.state() == workspace().state()


# --- checkpoints, declarations, frames ---

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}
LAYOUT = {"a": (2, 3), "b": (4,)}


@given(st.one_of(mutated(save(STATE)), st.binary(max_size=100)))
def test_a_checkpoint_is_the_models_or_refused(data):
    try:
        loaded = checkpoint.load(data, LAYOUT)
        assert {name: tuple(t.shape) for name, t in loaded.items()} == LAYOUT
    except checkpoint.CheckpointError as error:
        assert error.code in checkpoint.CODES


@given(st.one_of(mutated(b'{"a": ["F32", [2, 3]], "b": ["BF16", [4]]}'), JSON.map(lambda x: json.dumps(x).encode())))
def test_a_declaration_is_small_or_refused(data):
    try:
        found = checkpoint.declaration(data, 100)
        assert len(found.layout) > 0 and set(found.layout) == set(found.dtypes)
    except checkpoint.CheckpointError as error:
        assert error.code in checkpoint.CODES


@given(st.binary(max_size=40))
def test_frames_are_read_whole_or_end_the_run(data):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = types.SimpleNamespace(control=ours, pid=0, out_of_memory=lambda: False)
        candidate = Candidate(process, Limits(deadline_s=5, setup_s=1, stall_s=1, memory_bytes=1 << 20), 4096)
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        left = len(data)
        try:
            while True:
                frame = candidate.receive(1.0)
                left -= host.FRAME.size
                assert len(frame) == 4 and left >= 0
        except RunFailed as failure:
            assert failure.reason in ("candidate_exited", "candidate_error", "candidate_memory")


# --- ledgers and tiers ---


@pytest.fixture(scope="module")
def episode(tmp_path_factory):
    """The folder of an episode that was cut off."""
    folder = tmp_path_factory.mktemp("episode")
    env = Speedrun(TINY, backend=FakeBackend(hidden_losses([4.5] * 20)), state_dir=folder)
    env.reset()
    do(env, Run(horizon=60), WriteFile(path="optimizer.py", text=FAST), CLAIM, Note(text="x"))
    env.episode.ledger.close()
    return env.episode.folder


@given(st.data())
@settings(max_examples=100)
def test_a_damaged_ledger_is_read_or_refused(episode, tmp_path, data):
    good = (episode / "ledger.jsonl").read_bytes()
    folder = tmp_path / "e"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(episode, folder)
    (folder / "ledger.jsonl").write_bytes(data.draw(mutated(good)))
    for read, kind in ((read_ledger, tuple), (replay, Replay)):
        try:
            assert isinstance(read(folder / "ledger.jsonl"), kind)
        except LedgerError as error:
            assert "ledger" in str(error)
    env = Speedrun(TINY, backend=FakeBackend())
    try:
        env.resume(folder)
        assert env.episode.budget.spent("runs") >= 0
    except LedgerError:
        pass
    finally:
        env.close()


@given(st.data())
@settings(max_examples=100)
def test_a_damaged_tier_is_one_or_refused(tmp_path, data):
    folder = tmp_path / "tier"
    if not folder.exists():
        shutil.copytree(TINY, folder)
    (folder / "env.toml").write_bytes(data.draw(mutated((TINY / "env.toml").read_bytes())))
    try:
        tier = load_tier(folder, calibrated=False)
        assert tier.level() > 0
    except TierError as error:
        assert str(folder) in str(error)

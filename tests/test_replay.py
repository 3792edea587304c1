"""Replaying a ledger gives the same scores, and shows where somebody changed it."""

import json
import math
import shutil

import pytest
from helpers import ANCHOR, START, TARGET, make_tier

from nanogpt_env.errors import LedgerError
from nanogpt_env.ledger import VERSION, Ledger
from nanogpt_env.replay import replay
from nanogpt_env.scoring import recovered, share

TEST = make_tier().loss_test()
FIELDS = make_tier().trial_fields()
RUN = {"role": "candidate", "session": 0, "exit_reason": "completed", "train_seconds": 1.0}
GOOD = [TARGET - 0.09 + 0.001 * (i % 3) for i in range(5)]
BAD = [TARGET + 0.05]
assert TEST.decide(GOOD).outcome == "accept"
assert TEST.decide(GOOD[:4]).outcome == "continue"
assert TEST.decide(BAD).outcome == "reject"


def episode_lines(*submissions, form="linear"):
    """The lines of an episode with submissions of (claim, losses), as `Episode` writes them."""
    lines = [
        {
            "kind": "episode", "version": VERSION, "tier": "stub-steps", "track": "steps",
            "start": {"record": "adamw", "value": START}, "anchor": {"record": "normuon", "value": ANCHOR},
            "reward_form": form, "tests": FIELDS,
        },
        {"kind": "action", "type": "run"},
        {"kind": "charge", "handle": "run-1", "used": {"runs": 1.0}},
    ]  # fmt: skip
    best = START
    for number, (claim, losses) in enumerate(submissions, 1):
        name, before = f"submission-{number}", best
        accepted = TEST.decide([math.inf if x is None else x for x in losses]).outcome == "accept"
        best = min(best, float(claim)) if accepted else best
        lines.append({"kind": "submit", "submission": name, "claim": claim, "horizon": 300})
        lines += [{"kind": "rerun", "submission": name, "n": n, "loss": x, **RUN} for n, x in enumerate(losses, 1)]
        verdict = {"accepted": accepted, "value": float(claim) if accepted else None, "claim": claim, "horizon": 300}
        more = {"n": len(losses), "time": None, "trusted": True}
        lines.append({"kind": "verdict", "submission": name, **verdict, **more})
        reward = share(form, START, ANCHOR, best) - share(form, START, ANCHOR, before)
        lines.append({"kind": "reward", "submission": name, "best": best, "reward": reward})
    lines.append({"kind": "end", "reason": "closed", "best": best, "recovered": recovered(START, ANCHOR, best)})
    return lines


def write(path, lines):
    path.unlink(missing_ok=True)
    path.write_text("".join(json.dumps({"seq": i, **line}) + "\n" for i, line in enumerate(lines)))
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


@pytest.mark.parametrize("form", ["linear", "log"])
def test_an_honest_ledger_agrees(path, form):
    submissions = [(240, GOOD), (200, BAD), (180, GOOD), (210, GOOD), (150, [GOOD[0], None])]
    out = replay(write(path, episode_lines(*submissions, form=form)))
    assert out.differences == []
    assert (out.tier, out.best) == ("stub-steps", 180)
    assert out.recovered == pytest.approx((START - 180) / (START - ANCHOR))
    assert out.total_reward == pytest.approx(share(form, START, ANCHOR, 180))
    assert [s["accepted"] for s in out.submissions] == [True, False, True, True, False]
    assert [s["n"] for s in out.submissions] == [5, 1, 5, 5, 2]
    assert [s["reward"] > 0 for s in out.submissions] == [True, False, True, False, False]


def test_written_by_the_ledger_itself(path):
    ledger = Ledger(path)
    for line in episode_lines((200, GOOD)):
        ledger.append(**line)
    ledger.close()
    assert replay(path).differences == []


def test_an_episode_without_submissions(path):
    out = replay(write(path, episode_lines()))
    assert (out.best, out.recovered, out.total_reward, out.submissions, out.differences) == (START, 0, 0, [], [])


def test_an_undecided_submission_counts_for_nothing(path):
    """Interrupted, then offered again under the same name."""
    lines = episode_lines((200, GOOD))
    first = [{"kind": "submit", "submission": "submission-1", "claim": 150, "horizon": 300},
             {"kind": "rerun", "submission": "submission-1", "n": 1, "loss": BAD[0], **RUN},
             {"kind": "void", "submission": "submission-1"}]  # fmt: skip
    out = replay(write(path, lines[:3] + first + lines[3:]))
    assert out.differences == []
    assert out.best == 200


def test_a_torn_last_line_is_reported(path):
    write(path, episode_lines((200, GOOD)))
    path.write_bytes(path.read_bytes()[:-10])
    out = replay(path)
    assert "torn" in out.notes[0]
    assert out.best == 200


def test_an_episode_that_has_not_ended_says_so_and_a_folder_will_do(path):
    lines = episode_lines((200, GOOD))
    assert replay(write(path, lines)).notes == []
    write(path, lines[:-1])
    assert replay(path).notes == ["the episode has no end: it is going on, or was cut off"]
    folder = path.parent / "episode"
    folder.mkdir()
    (folder / "ledger.jsonl").write_bytes(path.read_bytes())
    assert replay(folder) == replay(path)
    path.unlink()
    assert replay(path.parent) == replay(folder)
    shutil.copytree(folder, path.parent / "other")
    with pytest.raises(LedgerError, match="holds 2 episodes; say which, such as"):
        replay(path.parent)


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("reward", {"reward": 1.0}, "reward"),
        ("reward", {"reward": math.nan}, "reward"),
        ("reward", {"reward": 0.52801}, "reward"),
        ("reward", {"best": 150.0}, "best"),
        ("verdict", {"accepted": False}, "accepted"),
        ("verdict", {"claim": 150}, "claim"),
        ("verdict", {"value": 150.0}, "value"),
        ("verdict", {"value": None}, "value"),
        ("verdict", {"value": math.nan}, "value"),
        ("verdict", {"horizon": 200}, "horizon"),
        ("verdict", {"n": 3}, "n"),
        ("submit", {"claim": 150}, "claim"),
        ("rerun", {"loss": TARGET + 1}, "accepted"),
        ("rerun", {"loss": None}, "accepted"),
        ("end", {"best": 150.0}, "best"),
        ("end", {"recovered": 1.0}, "recovered"),
    ],
)
def test_tampering_with_an_acceptance_shows(path, kind, change, named):
    lines = episode_lines((200, GOOD))
    line = next(x for x in lines if x["kind"] == kind)
    assert any(line[k] != v for k, v in change.items())
    line |= change
    assert any(named in d for d in replay(write(path, lines)).differences)


@pytest.mark.parametrize(
    ("kind", "change"),
    [("verdict", {"accepted": True}), ("verdict", {"value": 200.0}), ("reward", {"reward": 0.5}),
     ("end", {"recovered": 0.5}), ("rerun", {"loss": TARGET - 0.09})],
)  # fmt: skip
def test_tampering_with_a_rejection_shows(path, kind, change):
    lines = episode_lines((200, BAD))
    next(x for x in lines if x["kind"] == kind).update(change)
    assert replay(write(path, lines)).differences


def test_reruns_that_are_left_out_show(path):
    lines = episode_lines((200, GOOD))
    for _ in range(2):
        lines.remove(next(x for x in lines if x["kind"] == "rerun"))
        assert replay(write(path, lines)).differences


@pytest.mark.parametrize("field", ["start", "anchor"])
def test_another_start_or_anchor_shows(path, field):
    lines = episode_lines((200, GOOD))
    lines[0][field]["value"] -= 10
    assert replay(write(path, lines)).differences


def test_a_reward_from_nowhere_shows(path):
    lines = episode_lines()
    lines.insert(-1, {"kind": "reward", "submission": "submission-1", "reward": 0.5, "best": 200.0})
    assert replay(write(path, lines)).differences


@pytest.mark.parametrize(
    "lines",
    [[], [{"kind": "run"}], [{"kind": "episode"}], [{"kind": "episode", "version": VERSION + 1}],
     [{"kind": "episode", "version": VERSION - 1}],
     [{"kind": "episode", "version": str(VERSION)}], [{"kind": "run"}, *episode_lines()]],
)  # fmt: skip
def test_no_ledger_of_this_version(path, lines):
    with pytest.raises(LedgerError, match=f"version {VERSION}"):
        replay(write(path, lines))


GARBAGE = [None, "x", [], {}, [1, 2], {"a": 1}, -1, 0, 10**400, True]


@pytest.mark.parametrize("value", GARBAGE, ids=lambda v: repr(v)[:12])
def test_garbage_in_any_field_is_a_difference_or_a_ledger_error(path, value):
    """Every field of every line, nested ones too, replaced and removed."""
    original = episode_lines((200, GOOD), (190, BAD), form="log")
    for i, line in enumerate(original):
        for key in line:
            inner = line[key] if isinstance(line[key], dict) else {}
            changes = [{key: value}, *({key: inner | {k: value}} for k in inner)]
            lacking = [{k: v for k, v in line.items() if k != key}] if key != "kind" else []
            for changed in [*(line | c for c in changes), *lacking]:
                try:
                    replay(write(path, [*original[:i], changed, *original[i + 1 :]]))
                except LedgerError:
                    pass


@pytest.mark.parametrize(
    ("index", "key", "value"),
    [(0, "reward_form", "square"), (0, "start", {"value": "fast"}), (0, "start", {}), (0, "start", {"value": ANCHOR}),
     (0, "tests", {}), (0, "tests", {"loss": {}}), (0, "tests", {"loss": FIELDS["loss"] | {"boundary": 0.1}}),
     (0, "tests", {"loss": FIELDS["loss"] | {"n_max": 10**400}}), (0, "track", "wallclock"),
     (4, "loss", "low"), (4, "loss", 10**400), (4, "submission", "submission-9"), (9, "claim", "few"),
     (9, "submission", [])],
)  # fmt: skip
def test_garbage_that_scores_rest_on_is_an_error(path, index, key, value):
    lines = episode_lines((200, GOOD))
    assert key in lines[index]
    lines[index][key] = value
    with pytest.raises(LedgerError):
        replay(write(path, lines))


def test_damage_is_refused_with_its_line(path):
    write(path, episode_lines((200, GOOD)))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], b"garbage\n", *lines[5:]]))
    with pytest.raises(LedgerError, match="line 5"):
        replay(path)


def test_not_there(tmp_path):
    with pytest.raises(LedgerError, match="cannot read"):
        replay(tmp_path / "none.jsonl")

"""Going on with an episode whose process has died."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import TINY
from episodes import ACCEPTED_N, CLAIM, FAST, SLOW, do, lines, spent
from fakes import FakeBackend, hidden_losses

from nanogpt_env import LedgerError, Note, Run, Speedrun, Stop, Submit, WriteFile
from nanogpt_env.budget import METERS, RUN_METERS
from nanogpt_env.replay import replay

ACCEPT = [4.5] * (ACCEPTED_N + 8)  # some are started ahead


def dies(env):
    """What a killed process leaves: its files, and no lock. The folder."""
    env.episode.ledger.close()
    folder = env.episode.folder
    env._owns_episode = False  # `close` must not end it any more
    return folder


@pytest.fixture
def resumed(tmp_path):
    made = []

    def resumed(folder, backend=None, tier=TINY):
        env = Speedrun(tier, backend=backend or FakeBackend(), state_dir=tmp_path / "state")
        made.append(env)
        env.resume(folder)
        return env

    yield resumed
    for env in made:
        env.close()


def test_all_of_an_episode_is_there_again(make, resumed):
    env = make(FakeBackend(hidden_losses(ACCEPT)))
    do(env, WriteFile(path="optimizer.py", text=FAST), Note(text="it is fast"), Run(horizon=60, seed=3), CLAIM)
    do(env, WriteFile(path="optimizer.py", text=SLOW))
    before = {meter: spent(env, meter) for meter in METERS}
    known = env.episode.best, env.episode.recovered, env.episode.verdicts, env.workspace.files, env.history
    again = resumed(dies(env))
    assert (*known,) == (
        again.episode.best,
        again.episode.recovered,
        again.episode.verdicts,
        again.workspace.files,
        again.history,
    )
    assert again.workspace.notes == "it is fast\n" and again.episode.frontier.name == "submission-1"
    assert {m: spent(again, m) for m in METERS if m != "wall_seconds"} == {
        m: before[m] for m in METERS if m != "wall_seconds"
    }
    assert again.episode.runs["run-1"].result.val_losses == env.episode.runs["run-1"].result.val_losses


def test_the_same_program_is_not_verified_again(make, resumed):
    env = make(FakeBackend(hidden_losses(ACCEPT)))
    do(env, WriteFile(path="optimizer.py", text=FAST), CLAIM)
    again = resumed(dies(env), FakeBackend(hidden_losses([])))
    *_, info = do(again, CLAIM)
    assert info["verdict"]["cached"] and not info.get("error")


def test_it_goes_on(make, resumed):
    env = make()
    do(env, Run(horizon=60))
    again = resumed(dies(env), FakeBackend(hidden_losses(ACCEPT)))
    *_, info = do(again, Run(horizon=60))
    assert info["run"]["handle"] == "run-2"
    assert info["run"]["seed"] != env.episode.runs["run-1"].seed, "the same run for the price of two"
    assert do(again, WriteFile(path="optimizer.py", text=FAST), CLAIM)[1] > 0
    do(again, Stop())
    assert replay(again.episode.folder).differences == []


def test_a_claim_rests_on_runs_of_before(make, resumed):
    env = make(FakeBackend(lambda job, number: 4.4))
    do(env, *[Run(horizon=60)] * 3)
    again = resumed(dies(env), FakeBackend(lambda job, number: 4.4))
    advice = again.episode.advice(again.workspace.files, 60)
    assert advice == env.episode.advice(env.workspace.files, 60)


def test_a_run_under_way_is_charged_in_full(make, resumed):
    env = make(FakeBackend(hold=[1]))
    do(env, Run(horizon=60, wait=False))
    reserved = env.episode.runs["run-1"].reservation.amounts
    again = resumed(dies(env))
    assert {m: spent(again, m) for m in RUN_METERS} == {m: reserved[m] for m in RUN_METERS}
    assert "charged in full" in again.episode.runs["run-1"].error
    assert do(again, Run(horizon=60))[4]["run"]["handle"] == "run-2"


def test_a_submission_under_way_is_charged_and_void(make, resumed):
    def script(job, number):
        if number == 3:
            raise KeyboardInterrupt  # as if it were the kill
        return 4.5

    env = make(FakeBackend(script))
    do(env, WriteFile(path="optimizer.py", text=FAST))
    with pytest.raises(KeyboardInterrupt):
        env.step(CLAIM)
    path = env.episode.ledger.path
    folder = dies(env)
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[: next(i for i, line in enumerate(kept) if '"void"' in line or '"charge"' in line)]))
    again = resumed(folder, FakeBackend(hidden_losses(ACCEPT)))
    assert spent(again, "submissions") == 1 and again.episode.verdicts == []
    assert lines(again, "void")[0]["submission"] == "submission-1"
    assert do(again, CLAIM)[4]["verdict"]["submission"] == "submission-2"
    do(again, Stop())
    assert replay(folder).differences == []


def test_wherever_it_dies_nothing_becomes_cheaper(make, resumed, tmp_path):
    """The ledger cut off after each of its lines, and within the next."""
    env = make(FakeBackend(hidden_losses(ACCEPT)))
    do(env, Run(horizon=60), WriteFile(path="optimizer.py", text=FAST), Run(horizon=60), CLAIM, Note(text="x"))
    folder = dies(env)
    kept = (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    for count in range(1, len(kept) + 1):
        cut = tmp_path / f"cut-{count}"
        shutil.copytree(folder, cut)
        (cut / "ledger.jsonl").write_bytes(b"".join(kept[:count]) + (kept[count][:9] if count < len(kept) else b""))
        again = resumed(cut)
        charged = dict.fromkeys(METERS, 0.0)
        for line in map(json.loads, kept[:count]):
            for meter, amount in line.get("used", {}).items():
                charged[meter] += amount
            charged["episode_steps"] += line["kind"] == "action"
        assert all(spent(again, meter) >= charged[meter] for meter in METERS), kept[count - 1]
        again.close()
        assert replay(cut).differences == []


def test_an_episode_in_use_is_left_alone(make, resumed):
    env = make()
    with pytest.raises(LedgerError, match="another environment"):
        resumed(env.episode.folder)
    assert do(env, Note(text="x"))[0]["text"] == "noted"


def test_an_episode_that_has_ended_stays_so(make, resumed):
    env = make()
    do(env, Stop())
    with pytest.raises(LedgerError, match="has ended: stopped by the agent"):
        resumed(env.episode.folder)


def test_another_tier_is_refused(make, resumed):
    folder = dies(make())
    with pytest.raises(LedgerError, match="is of tier tiny-steps, not of nano-steps"):
        resumed(folder, tier="nano-steps")


@pytest.mark.parametrize("damage", ["{", "[]", '{"episode": "x"}', '{"episode": "x", "snapshots": {}}', None])
def test_a_damaged_checkpoint_is_refused(make, resumed, damage):
    folder = dies(make())
    if damage is None:
        (folder / "checkpoint.json").unlink()
    else:
        (folder / "checkpoint.json").write_text(damage)
    with pytest.raises(LedgerError, match="checkpoint"):
        resumed(folder)


def test_evidence_that_is_gone_is_said(make, resumed):
    env = make(FakeBackend(hidden_losses(ACCEPT)))
    do(env, WriteFile(path="optimizer.py", text=FAST), CLAIM)
    folder = dies(env)
    shutil.rmtree(Path(folder) / "evidence")
    with pytest.raises(LedgerError, match="evidence"):
        resumed(folder)


def test_a_clock_that_was_set_back_gives_no_time(make, resumed):
    folder = dies(make())
    path = folder / "ledger.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    head = json.loads(first)
    path.write_text(json.dumps({**head, "time": head["time"] + 1e6}) + "\n" + "".join(rest))
    assert 0 <= spent(resumed(folder), "wall_seconds") < 60


def test_wall_time_goes_on(make, resumed):
    env = make()
    folder = dies(env)
    again = resumed(folder)
    assert 0 <= spent(again, "wall_seconds") < 60
    assert isinstance(CLAIM, Submit)

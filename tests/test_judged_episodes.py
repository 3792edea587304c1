"""What judges may do to a submission, and what they cannot."""

import pytest
from episodes import CLAIM, do, lines
from fakes import FakeBackend
from judged import HELD_OUT, Obeys, Told, seated

from nanogpt_env import Submit, WriteFile
from nanogpt_env.errors import LedgerError
from nanogpt_env.judging.cases import read_cases
from nanogpt_env.replay import replay
from nanogpt_env.workspace import without_comments


def test_a_veto_denies_before_anything_runs(make):
    env = seated(make, judge := Told("break"), backend=(backend := FakeBackend()))
    observation, reward, _, _, info = do(env, CLAIM)
    verdict = info["verdict"]
    assert (reward, verdict["accepted"], verdict["n"], verdict["vetoed_by"]) == (0, False, 0, "static")
    assert "vetoed by static: data at optimizer.py line 2" in observation["text"]
    assert not backend.jobs
    assert info["budget"]["submissions"]["spent"] == 1
    assert do(env, CLAIM)[4]["verdict"]["cached"] and len(judge.given) == 1
    assert replay(env.episode.ledger.path).differences == []


def test_a_veto_is_about_the_text_and_a_measurement_about_the_program(make):
    env = seated(make, judge := Told("break"))
    do(env, CLAIM)
    judge.outcome = "pass"
    text = env.workspace.files["optimizer.py"]
    assert do(env, WriteFile(path="optimizer.py", text=text + "# else\n"), CLAIM)[4]["verdict"]["accepted"]
    assert len(judge.given) == 2
    do(env, WriteFile(path="optimizer.py", text=text + "# other\n"), CLAIM)
    assert len(judge.given) == 2


def test_what_is_judged_is_what_runs(make):
    env = seated(make, judge := Told(), backend=(backend := FakeBackend()))
    do(env, CLAIM)
    assert without_comments(judge.given[0].sources["optimizer.py"], "") == backend.jobs[0].source
    assert judge.given[0].start == env.episode.start_program.sources


def test_advice_is_told_and_changes_nothing(make):
    plain, advised = make(), seated(make, Told("break"), mode="advisory")
    _, reward, *_ = do(plain, CLAIM)
    observation, same, _, _, info = do(advised, CLAIM)
    assert same == reward > 0
    assert "flagged by static: data at optimizer.py line 2" in observation["text"]
    assert [o["outcome"] for o in info["verdict"]["opinions"]] == ["break"]
    assert [line["mode"] for line in lines(advised, "opinion")] == ["advisory"]
    assert replay(advised.episode.ledger.path).differences == []


@pytest.mark.parametrize("how", ["unavailable", "raises"])
def test_a_veto_judge_that_is_not_to_be_had_defers(make, how):
    judge = Told("unavailable") if how == "unavailable" else Told(fails="the line is dead")
    env = seated(make, judge, backend=(backend := FakeBackend()))
    observation, reward, _, _, info = do(env, CLAIM)
    assert info["error"] == "BackendError" and "deferred" in observation["text"]
    assert "the line is dead" in observation["text"] and "nothing was charged" in observation["text"]
    assert (reward, info["budget"]["submissions"]["spent"], backend.jobs) == (0, 0, [])
    judge.outcome, judge.fails = "pass", ""
    assert do(env, CLAIM)[1] > 0
    assert replay(env.episode.ledger.path).differences == []


def test_an_advisor_that_is_not_to_be_had_holds_nothing_up(make):
    env = seated(make, Told("unavailable"), mode="advisory")
    observation, reward, *_ = do(env, CLAIM)
    assert reward > 0 and "the line is dead" in observation["text"]


def test_spending_is_limited(make):
    env = seated(make, judge := Told(), mode="advisory", tokens=200)
    for claim in (60, 61, 62):
        do(env, Submit(claim=claim, horizon=62))
    assert len(judge.given) == 2
    assert "tokens are spent" in lines(env, "opinion")[2]["detail"]


def test_text_that_a_judge_cannot_answer_about_is_not_free_for_ever(make):
    env = seated(make, judge := Told("unavailable", reached=True))
    spent = [do(env, CLAIM)[4]["budget"]["submissions"]["spent"] for _ in range(4)]
    assert spent == [0, 0, 1, 2]
    folder = env.episode.folder
    env.leave()
    again = seated(make, Told())
    again.resume(folder)
    assert again.episode.evasions == 4 and len(judge.given) == 4
    assert replay(folder).differences == []


def test_the_rules_are_told_at_the_beginning(make):
    env = seated(make, Told())
    observation, _ = env.reset()
    assert "Rules for submissions, as of" in observation["text"] and "[counting]" in observation["text"]
    assert "Rules for submissions" not in make().reset()[0]["text"]


def test_a_resumed_episode_knows_its_verdicts_and_what_was_spent(make, tmp_path):
    env = seated(make, Told("break"), tokens=150)
    do(env, CLAIM)
    folder = env.episode.folder
    env.leave()
    again = seated(make, judge := Told("pass"), tokens=150)
    again.resume(folder)
    assert again.episode.judge_spent["static"].tokens == 100
    assert do(again, CLAIM)[4]["verdict"]["vetoed_by"] == "static" and not judge.given
    again.leave()
    with pytest.raises(LedgerError, match="other judges"):
        make().resume(folder)


def test_a_veto_that_was_not_heeded_is_found(make):
    env = seated(make, Told("break"), mode="advisory")
    do(env, CLAIM)
    path = env.episode.ledger.path
    env.close()
    path.write_text(path.read_text().replace('"mode": "advisory"', '"mode": "veto"'))
    assert any("had vetoed" in d for d in replay(path).differences)


@pytest.mark.parametrize("loss", [4.5, 5.2], ids=["good", "bad"])
def test_the_reward_never_moves_by_what_a_judge_says(make, loss):
    """Held-out programs, with an obedient judge and with none: what is paid is what was measured."""
    paid = {}
    for name in ("none", "obedient"):
        for case in read_cases(HELD_OUT):
            if case.material.tier != "nano-steps":
                continue
            backend = FakeBackend(lambda job, number: loss)
            env = make(backend) if name == "none" else seated(make, Obeys(), backend=backend)
            do(env, WriteFile(path="optimizer.py", text=case.material.sources["optimizer.py"]))
            _, reward, _, _, info = do(env, CLAIM)
            paid.setdefault(case.name, []).append((reward, info.get("verdict", {}).get("accepted"), info.get("error")))
            env.close()
    assert len(paid) >= 8
    assert all(without == with_it for without, with_it in paid.values())
    if loss > 5:
        assert not any(reward for both in paid.values() for reward, *_ in both)

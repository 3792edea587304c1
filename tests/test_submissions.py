"""Submissions of an episode: verdicts, rewards, claims left out."""

import json
import math
import shutil

import pytest
from conftest import TINY
from episodes import ACCEPTED_N, ANCHOR, CLAIM, FAST, SLOW, START, TIER, do, lines, share, spent
from fakes import LOST, FakeBackend, hidden_losses, ran
from helpers import edit

from nanogpt_env import EditFile, LedgerError, ReadFile, Run, Submit, WriteFile
from nanogpt_env.claims import advise
from nanogpt_env.replay import replay
from nanogpt_env.spaces import SCORES
from nanogpt_env.stats import margin_for_power

# --- submissions and rewards ---


def test_the_reward_is_the_increment_of_what_is_recovered(make):
    env = make()
    rewards = [do(env, Submit(claim=claim, horizon=90))[1] for claim in (80, 60, 55)]
    assert rewards == pytest.approx([share(80), share(60) - share(80), share(55) - share(60)])
    assert sum(rewards) == pytest.approx(env.episode.recovered) == pytest.approx(share(55))
    assert env.episode.frontier.name == "submission-3"
    assert (env.episode.frontier.sources, env.episode.best) == ({"optimizer.py": SLOW}, 55)
    assert [v.value for v in env.episode.verdicts] == [80, 60, 55]
    rows = [json.loads(path.read_text()) for path in sorted((env.episode.folder / "evidence").iterdir())]
    assert [(row["start"], row["best"]) for row in rows] == [("slow", START), ("slow", 80), ("slow", 60)]


def test_the_log_form_pays_for_ratios(make, tmp_path):
    folder = tmp_path / "tiny-log"
    shutil.copytree(TINY, folder)
    edit(folder / "env.toml", 'form = "linear"', 'form = "log"')
    env = make(tier=folder)
    rewards = [do(env, Submit(claim=claim, horizon=90))[1] for claim in (80, 60)]
    assert sum(rewards) == pytest.approx(math.log(START / 60) / math.log(START / ANCHOR))
    assert env.episode.recovered == pytest.approx(share(60))  # the figure that compares with others stays
    assert lines(env, "reward")[-1]["recovered_log"] == pytest.approx(sum(rewards))


def test_an_over_claim_pays_nothing(make):
    env = make(FakeBackend(hidden_losses([4.5] * (ACCEPTED_N + 1) + [5.2] * 2)))
    do(env, CLAIM)
    observation, reward, terminated, truncated, info = do(env, Submit(claim=40, horizon=60))
    assert (reward, terminated, truncated) == (0, False, False)
    assert not info["verdict"]["accepted"]
    assert info["verdict"]["value"] is None
    assert env.episode.frontier.name == "submission-1"
    assert "rejected" in observation["text"]
    assert info["best"] == 60
    assert observation["scores"][SCORES.index("last_accepted")] == 0
    assert spent(env, "submissions") == 2


@pytest.mark.parametrize("claim", [60, 61, 95])
def test_an_acceptance_that_is_no_better_pays_nothing(make, claim):
    env = make()
    do(env, CLAIM)
    _, reward, _, _, info = do(
        env, WriteFile(path="optimizer.py", text=FAST), Submit(claim=claim, horizon=max(claim, 60))
    )
    assert info["verdict"]["accepted"]
    assert reward == 0
    assert info["best"] == 60


def test_a_claim_beyond_the_start_record_never_costs(make):
    env = make()
    claim = math.ceil(START) + 1
    _, reward, _, _, info = do(env, Submit(claim=claim, horizon=claim))
    assert info["verdict"]["accepted"]
    assert (reward, info["recovered"], info["best"]) == (0, 0, START)


def test_beyond_the_anchor_more_than_one_is_recovered(make):
    env = make()
    assert share(30) > 1
    assert do(env, Submit(claim=30, horizon=60))[1] == pytest.approx(share(30))


@pytest.mark.parametrize("good", [True, False])
def test_the_same_program_and_claim_keep_their_verdict(make, good):
    env = make(backend := FakeBackend(lambda job, number: 4.5 if good else 5.2))
    first = do(env, CLAIM)[4]["verdict"]
    started = len(backend.jobs)
    for same in (SLOW + "\n# thoughts\n", '"""Other words."""\n' + SLOW.split("\n", 1)[1], SLOW.replace("(", "( ")):
        assert same != SLOW
        observation, reward, _, _, info = do(env, WriteFile(path="optimizer.py", text=same), CLAIM)
        assert info["verdict"] == {**first, "cached": True}
        assert "nothing was rerun" in observation["text"]
        assert reward == 0
    assert len(backend.jobs) == started
    assert spent(env, "submissions") == 1
    assert info["verification_device_seconds"] == first["device_seconds"]


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (ReadFile(), Submit(claim=59, horizon=60)),
        (ReadFile(), Submit(claim=60, horizon=61)),
        (EditFile(path="optimizer.py", old="0.004", new="0.0041"), CLAIM),
    ],
    ids=["claim", "horizon", "program"],
)
def test_another_claim_horizon_or_program_is_verified_anew(make, change, again):
    env = make(backend := FakeBackend())
    do(env, CLAIM)
    started = len(backend.jobs)
    assert do(env, change, again)[4]["verdict"]["cached"] is False
    assert len(backend.jobs) > started
    assert spent(env, "submissions") == 2


def test_our_failure_in_verification_is_neither_charged_nor_remembered(make):
    failing = [True]
    env = make(FakeBackend(lambda job, number: LOST if failing[0] else 4.5))
    observation, reward, _, _, info = do(env, CLAIM)
    assert info["error"] == "BackendError"
    assert "nothing was charged" in observation["text"]
    assert reward == 0
    assert (spent(env, "submissions"), env.episode.verdicts) == (0, [])
    failing[0] = False
    _, reward, _, _, info = do(env, CLAIM)
    assert info["verdict"]["cached"] is False
    assert reward == pytest.approx(share(60))
    assert [line["submission"] for line in lines(env, "void")] == ["submission-1"]
    assert replay(env.episode.ledger.path).differences == []


def test_evidence_that_cannot_be_written_decides_nothing(make):
    env = make()
    (env.episode.folder / "evidence").write_text("in the way")
    with pytest.raises(LedgerError, match="evidence"):
        env.step(CLAIM)
    assert (spent(env, "submissions"), env.episode.verdicts, env.episode.best) == (0, [], START)
    (env.episode.folder / "evidence").unlink()
    assert do(env, CLAIM)[1] == pytest.approx(share(60))


def test_an_untrusted_acceptance_says_so(make):
    env = make(FakeBackend(lambda job, number: ran(job, 4.5, trusted=False)))
    observation, _, _, _, info = do(env, CLAIM)
    assert info["verdict"]["trusted"] is False
    assert "trusted: false" in observation["text"]


# --- claims left out ---


def test_without_a_claim_the_runs_decide_it(make):
    env = make(backend := FakeBackend())
    claims = []
    for _ in range(2):
        do(env, Run(horizon=100))
        expected = advise(TIER, [run.outcome for run in backend.runs if run.job.final_shards == ("val_public",)])
        observation, reward, _, _, info = do(env, Submit())
        assert info["verdict"]["claim"] == expected.claim
        assert info["verdict"]["horizon"] == 100
        assert observation["text"].startswith(f"claim {expected.claim}: predicted power")
        claims.append(expected.claim)
        assert reward > 0
    assert 50 < claims[1] < claims[0] < 80  # two runs tell more than one


@pytest.mark.parametrize(
    ("before", "action", "text"),
    [
        ([], Submit(), "give a claim or a horizon, or complete a run"),
        ([], Submit(horizon=100), "no completed run of this program at this horizon"),
        ([Run(horizon=90)], Submit(horizon=100), "no completed run of this program at this horizon"),
        ([Run(horizon=100), WriteFile(path="optimizer.py", text=FAST)], Submit(), "give a claim or a horizon"),
    ],
)
def test_without_a_claim_and_a_run_nothing_is_submitted(make, before, action, text):
    env = make(backend := FakeBackend())
    observation, _, _, _, info = do(env, *before, action)
    assert info["error"] == "ActionError"
    assert text in observation["text"]
    assert spent(env, "submissions") == 0
    assert all(job.final_shards == ("val_public",) for job in backend.jobs)


@pytest.mark.parametrize(
    ("power", "text"), [(1e-3, "no number of runs makes that likely"), (0.93, "more run(s) at this horizon would tell")]
)
def test_runs_that_support_no_claim_say_what_would(make, power, text):
    # the loss that is accepted with this power, seen once: one run does not pin it down
    loss = (
        TIER.table.training.target
        - margin_for_power(TIER.loss_test(), TIER.measured.sigma, power)
        + TIER.measured.shard_offset
    )
    env = make(FakeBackend(lambda job, number: loss))
    observation, _, _, _, info = do(env, Run(horizon=100), Submit())
    assert info["error"] == "ActionError"
    assert text in observation["text"]
    assert spent(env, "submissions") == 0


def test_a_failed_run_supports_no_claim(make):
    env = make(FakeBackend(lambda job, number: ran(job, 4.5, reason="candidate_error")))
    assert do(env, Run(horizon=100), Submit())[4]["error"] == "ActionError"

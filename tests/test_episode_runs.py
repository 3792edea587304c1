"""Runs of an episode: budgets, several at once, interruption."""

import pytest
from episodes import CLAIM, FAST, SLOW, TIER, NoTraining, do, interrupt, lines, nothing_reserved, share, spent
from fakes import LOST, FakeBackend, ran

from nanogpt_env import ApplyPatch, Cancel, Note, Poll, ReadFile, Revert, Run, Stop, Submit, WriteFile
from nanogpt_env.budget import RUN_METERS
from nanogpt_env.replay import replay

# --- runs and their budget ---


def test_a_run_is_reserved_while_it_goes_and_charged_for_what_it_used(make):
    reserved = {}

    def script(job, number):
        budget = env.episode.budget
        reserved.update({m: budget.limits[m] - budget.left(m) for m in RUN_METERS})
        return ran(job, 4.5, 2.5)

    env = make(FakeBackend(script))
    _, reward, terminated, truncated, info = do(env, Run(horizon=100, steps=80))
    assert (reward, terminated, truncated) == (0, False, False)
    tokens = 80 * TIER.tokens_per_step()
    flops = tokens * TIER.flops_per_token()
    assert reserved == pytest.approx({"device_seconds": 60, "flops": flops, "tokens": tokens, "runs": 1})
    assert {m: spent(env, m) for m in RUN_METERS} == pytest.approx(
        {"device_seconds": 2.5, "flops": 1000 * tokens, "tokens": tokens, "runs": 1}
    )
    assert nothing_reserved(env)
    assert info["run"]["val_losses"] == {"val_public": 4.5}
    assert info["budget"]["device_seconds"]["spent"] == 2.5


def test_the_job_of_a_run_is_the_workspace_on_the_public_shard(make):
    env = make(backend := FakeBackend())
    do(env, WriteFile(path="optimizer.py", text=FAST), Run(), Run(steps=30), Run(horizon=70, steps=20, seed=5), Run())
    jobs, full = backend.jobs, TIER.records["slow"].horizon
    assert all(job.source == FAST and job.final_shards == ("val_public",) for job in jobs)
    assert [(job.steps, job.horizon) for job in jobs] == [(full, full), (30, 30), (20, 70), (full, full)]
    assert jobs[2].seed == "agent/5"
    assert len({job.seed for job in jobs}) == 4


@pytest.mark.parametrize("reason", ["candidate_error", "deadline", "rule_too_slow"])
def test_a_run_that_fails_is_an_observation_and_is_charged(make, reason):
    env = make(FakeBackend(lambda job, number: ran(job, 9.0, 3.0, reason=reason, detail="boo", log="line\n")))
    observation, reward, _, _, info = do(env, Run(horizon=100))
    assert reason in observation["text"] and "boo" in observation["text"] and "| line" in observation["text"]
    assert "error" not in info
    assert info["run"]["exit_reason"] == reason
    assert (reward, spent(env, "device_seconds"), spent(env, "runs")) == (0, 3.0, 1)
    assert nothing_reserved(env)


def test_a_cancelled_run_is_charged_for_what_it_used(make):
    env = make(FakeBackend(hold={1}))
    handle = do(env, Run(horizon=100, wait=False))[4]["run"]["handle"]
    info = do(env, Cancel(handle=handle))[4]
    assert info["run"]["exit_reason"] == "cancelled"
    assert spent(env, "device_seconds") == 0.25
    assert spent(env, "tokens") == 50 * TIER.tokens_per_step()
    assert nothing_reserved(env)
    do(env, Cancel(handle=handle))  # again: nothing more
    assert (spent(env, "device_seconds"), spent(env, "runs")) == (0.25, 1)


def test_our_failures_are_not_charged(make):
    def script(job, number):
        if number == 1:
            raise LOST
        return LOST

    env = make(FakeBackend(script))
    for _ in range(2):  # in start, then in the run
        observation, _, _, _, info = do(env, Run(horizon=100))
        assert info["error"] == "BackendError"
        assert "node lost" in observation["text"] and "charged" in observation["text"]
    assert all(spent(env, meter) == 0 for meter in RUN_METERS)
    assert nothing_reserved(env)


@pytest.mark.parametrize(
    ("meter", "one_run"),
    [
        ("runs", 1),
        ("device_seconds", 1),
        ("flops", 100 * TIER.tokens_per_step() * TIER.flops_per_token()),
        ("tokens", 100 * TIER.tokens_per_step()),
    ],
)
@pytest.mark.parametrize("share_of_a_run", [0.0, 0.5, 0.9])
def test_a_run_that_the_budget_cannot_pay_is_refused(make, meter, one_run, share_of_a_run):
    flops_per_step = TIER.tokens_per_step() * TIER.flops_per_token()
    backend = FakeBackend(lambda job, number: ran(job, 4.5, 1.0, flops=job.steps * flops_per_step))
    env = make(backend, budget={meter: (1 + share_of_a_run) * one_run})
    assert "error" not in do(env, Run(horizon=100))[4]
    before = {m: spent(env, m) for m in RUN_METERS}
    observation, _, terminated, truncated, info = do(env, Run(horizon=100))
    assert info["error"] == "BudgetError"
    assert meter in observation["text"]
    assert not terminated and not truncated
    assert len(backend.jobs) == 1
    assert {m: spent(env, m) for m in RUN_METERS} == before


def test_a_spent_research_budget_still_allows_a_submission(make):
    env = make(budget={"runs": 1, "device_seconds": 1.5})
    do(env, Run(horizon=100))
    assert do(env, Run(horizon=100))[4]["error"] == "BudgetError"
    _, reward, _, truncated, _ = do(env, CLAIM)
    assert reward == pytest.approx(share(60))
    assert not truncated


def test_verification_is_metered_apart(make):
    env = make()
    _, _, _, _, info = do(env, CLAIM)
    assert all(spent(env, meter) == 0 for meter in RUN_METERS)
    assert info["verification_device_seconds"] == env.episode.verdicts[0].device_seconds > 0


def test_what_is_left_of_the_budget_bounds_a_run(make):
    env = make(backend := FakeBackend(), budget={"device_seconds": 20})
    do(env, Run(horizon=100))
    assert backend.jobs[0].limits.deadline_s == 20
    assert env.episode.tier.limits().deadline_s == 60


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (Run(horizon=201), "1 <= steps <= horizon <= 200"),
        (Run(horizon=50, steps=51), "1 <= steps <= horizon"),
        (Submit(claim=61, horizon=60), "1 <= steps <= horizon"),
        (Submit(claim=10, horizon=999), "<= 200"),
    ],
)
def test_impossible_numbers_are_refused_for_free(make, action, text):
    env = make(NoTraining())
    observation, _, _, _, info = do(env, action)
    assert info["error"] == "ActionError"
    assert text in observation["text"]
    assert nothing_reserved(env) and spent(env, "submissions") == 0


@pytest.mark.parametrize("action", [Run(), CLAIM, Submit()])
@pytest.mark.parametrize("source", ["def configure(", "import os\ndef configure(params, horizon): ...", "x = 1", ""])
def test_what_the_static_judge_refuses_never_runs(make, action, source):
    env = make(NoTraining())
    observation, _, _, _, info = do(env, WriteFile(path="optimizer.py", text=source), action)
    assert info["error"] == "JudgeError"
    assert "static judge" in observation["text"]


def test_edits_cost_a_step_and_nothing_else(make):
    env = make(NoTraining())
    patch = "--- a/optimizer.py\n+++ b/optimizer.py\n@@ -1,1 +1,1 @@\n" + "-" + SLOW.split("\n")[0] + '\n+"""New."""\n'
    do(env, ApplyPatch(patch=patch), Note(text="x"), Revert(), "garbage", ReadFile(path="notes.md"))
    assert spent(env, "episode_steps") == 5
    assert all(spent(env, meter) == 0 for meter in RUN_METERS)
    assert env.workspace.files["optimizer.py"] == SLOW


# --- several at once ---


def test_slots_bound_the_runs_at_a_time(make):
    env = make(backend := FakeBackend(hold={1, 2}))
    do(env, Run(horizon=100, wait=False), Run(horizon=100, wait=False))
    observation, _, _, _, info = do(env, Run(horizon=100))
    assert info["error"] == "ActionError" and "2 slot(s)" in observation["text"]
    assert info["running"] == ["run-1", "run-2"]
    backend.runs[0].held = False
    info = do(env, Run(horizon=100))[4]
    assert info["running"] == ["run-2"]
    assert info["run"]["handle"] == "run-3"


def test_a_run_that_is_not_waited_for_is_polled(make):
    env = make(backend := FakeBackend(hold={1}))
    observation, _, _, _, info = do(env, Run(horizon=100, wait=False))
    assert info["run"] == {"handle": "run-1", "done": False, "horizon": 100, "seed": info["run"]["seed"]}
    assert "running, 1 of 100" in observation["text"]
    assert do(env, Poll(handle="run-1"))[4]["run"]["done"] is False
    backend.runs[0].held = False
    info = do(env, Poll(handle="run-1"))[4]
    assert info["run"]["done"] is True
    assert info["run"]["exit_reason"] == "completed"
    assert do(env, Poll(handle="run-1"))[4]["run"] == info["run"]
    assert spent(env, "runs") == 1


def test_a_run_that_ended_is_charged_without_being_polled(make):
    env = make(backend := FakeBackend(hold={1}))
    do(env, Run(horizon=100, wait=False))
    backend.runs[0].held = False
    assert do(env, Note(text="x"))[4]["budget"]["device_seconds"]["spent"] == 1.0


@pytest.mark.parametrize("action", [Poll(handle="run-2"), Cancel(handle="submission-1"), Poll(handle="")])
def test_an_unknown_handle_is_refused(make, action):
    env = make()
    observation, _, _, _, info = do(env, Run(horizon=100), action)
    assert info["error"] == "ActionError"
    assert "there are run-1" in observation["text"]


def test_the_end_cancels_and_charges_what_runs(make):
    env = make(backend := FakeBackend(hold={1, 2}))
    do(env, Run(horizon=100, wait=False), Run(horizon=100, wait=False), Stop())
    assert all(run.cancelled for run in backend.runs)
    assert spent(env, "device_seconds") == 0.5
    assert lines(env, "end")[0]["budget"]["runs"]["spent"] == 2


def test_an_interrupt_cancels_and_charges_the_run_waited_for(make):
    env = make(backend := FakeBackend(hold={1}))
    env.on_progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        env.step(Run(horizon=100))
    assert backend.runs[0].cancelled
    assert spent(env, "device_seconds") == 0.25
    assert nothing_reserved(env)
    assert do(env, ReadFile())[4]["running"] == []


def test_an_interrupted_submission_is_undecided_and_charged(make):
    """Free, it would be a look at the first reruns, as often as one likes."""
    env = make(backend := FakeBackend(hold={1, 2}))
    env.on_progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        env.step(CLAIM)
    assert all(run.cancelled for run in backend.runs)
    assert spent(env, "submissions") == 1
    env.on_progress = lambda what, handle: None
    verdict = do(env, CLAIM)[4]["verdict"]
    assert verdict["accepted"] and not verdict["cached"]
    assert replay(env.episode.ledger.path).differences == []

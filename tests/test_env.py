"""The environment: Gymnasium's contract, accounts, rewards, ends, forks. Nothing here trains; see
test_real_episodes.py for that."""

import itertools
import json
import math
import shutil
import stat
import statistics
import time

import gymnasium
import numpy as np
import pytest
from conftest import TINY
from fakes import LOST, FakeBackend, hidden_losses, ran
from gymnasium.utils.env_checker import check_env
from helpers import edit

import nanogpt_env
from nanogpt_env import (
    ActionError,
    ApplyPatch,
    BackendError,
    Cancel,
    EditFile,
    LedgerError,
    Note,
    Poll,
    ReadFile,
    Revert,
    Run,
    Speedrun,
    Stop,
    Submit,
    TierError,
    WriteFile,
)
from nanogpt_env.actions import to_flat
from nanogpt_env.agents import LadderAgent, play
from nanogpt_env.budget import METERS, RUN_METERS
from nanogpt_env.claims import advise
from nanogpt_env.ledger import read_ledger
from nanogpt_env.replay import replay
from nanogpt_env.spaces import SCORES
from nanogpt_env.stats import margin_for_power
from nanogpt_env.tiers import builtin_tiers, load_tier
from nanogpt_env.types import RunResult

TIER = load_tier(TINY)
START, ANCHOR = TIER.value_of("slow"), TIER.value_of("fast")
SLOW, FAST = (TIER.records[name].source for name in ("slow", "fast"))
ACCEPTED_N = TIER.test().decide([4.5] * 6).n
CLAIM = Submit(claim=60, horizon=60)
INFO = {
    "episode", "ledger", "snapshot", "best_steps", "recovered", "budget", "verification_device_seconds", "running",
}  # fmt: skip


def share(steps):
    return (START - steps) / (START - ANCHOR)


class NoTraining:
    """Fails the test when anything is trained."""

    def start(self, job):
        raise AssertionError(f"a run was started: {job.steps} steps")

    def close(self):
        pass


@pytest.fixture
def make(tmp_path):
    """Environments on tiny-steps and a scripted backend, reset and ready."""
    made = []

    def make(backend=None, tier=TINY, **options):
        env = Speedrun(tier, backend=backend or FakeBackend(), state_dir=tmp_path / "state", **options)
        made.append(env)
        env.reset()
        return env

    yield make
    for env in made:
        env.close()


def do(env, *actions):
    """Steps; the last one's result, whose observation must be one."""
    for action in actions:
        result = env.step(action)
        assert env.observation_space.contains(result[0]), result[0]
    return result


def spent(env, meter):
    return env.episode.budget.spent(meter)


def nothing_reserved(env):
    budget = env.episode.budget
    return all(budget.left(m) == pytest.approx(budget.limits[m] - budget.spent(m)) for m in RUN_METERS)


def lines(env, kind):
    return [line for line in read_ledger(env.episode.ledger.path)[0] if line["kind"] == kind]


# --- Gymnasium's contract ---


def test_every_built_in_tier_has_an_id():
    ids = {name for name in gymnasium.registry if name.startswith("NanoGPT/")}
    assert ids == {"NanoGPT/Speedrun-v0", "NanoGPT/NanoSteps-v0", "NanoGPT/MicroSteps-v0"}
    assert all(gymnasium.spec(name).nondeterministic for name in ids)
    assert len(ids) == 1 + len(builtin_tiers())


def test_check_env_on_a_tier_given_by_path():
    env = gymnasium.make("nanogpt_env:NanoGPT/Speedrun-v0", tier=str(TINY), backend=NoTraining())
    check_env(env.unwrapped)  # pytest turns every warning into an error
    env.close()


@pytest.mark.parametrize("name", builtin_tiers())
def test_check_env_on_the_built_in_tiers(name):
    title = "".join(part.capitalize() for part in name.split("-"))
    env = gymnasium.make(f"NanoGPT/{title}-v0", backend=NoTraining())
    assert env.unwrapped.tier.name == name
    check_env(env.unwrapped)
    env.close()


def test_sampled_actions_never_start_a_run(make):
    env = make(NoTraining(), budget={"episode_steps": 1e6})
    env.action_space.seed(0)
    seen = set()
    for _ in range(1500):
        action = env.action_space.sample()
        seen.add(int(action["type"]))
        _, reward, terminated, truncated, info = env.step(action)
        assert (reward, terminated, truncated) == (0, False, False)
        assert info["error"] == "ActionError"
    assert len(seen) == 11
    assert all(spent(env, meter) == 0 for meter in RUN_METERS)


def test_make_wraps_models_dicts_and_text_alike(tmp_path):
    backend = FakeBackend()
    env = gymnasium.make("NanoGPT/Speedrun-v0", tier=TINY, backend=backend, state_dir=tmp_path)
    env.reset(seed=3)
    action = EditFile(path="optimizer.py", old="0.004", new="0.005")
    for form in (action, to_flat(action), action.model_dump(), action.model_dump_json()):
        env.step(Revert())
        _, _, _, _, info = env.step(form)
        assert "error" not in info
        assert env.unwrapped.workspace.files["optimizer.py"] == SLOW.replace("0.004", "0.005")
    env.close()


def test_a_vector_of_environments_edits_apart(tmp_path):
    envs = gymnasium.make_vec(
        "NanoGPT/Speedrun-v0", num_envs=2, vectorization_mode="sync", tier=str(TINY), state_dir=str(tmp_path)
    )
    observation, info = envs.reset(seed=1)
    assert observation["scores"].shape == (2, len(SCORES))
    assert observation["budget"].shape == (2, len(METERS))
    assert len(set(info["episode"])) == 2
    models = [WriteFile(path="optimizer.py", text=f"x = {i}\n") for i in range(2)]
    flat = [to_flat(m) for m in models]
    batch = {key: tuple(f[key] for f in flat) for key in flat[0]}
    observation, rewards, terminated, truncated, _ = envs.step(batch)
    assert all("wrote optimizer.py" in text for text in observation["text"])
    assert not rewards.any() and not terminated.any() and not truncated.any()
    assert [env.unwrapped.workspace.files["optimizer.py"] for env in envs.envs] == ["x = 0\n", "x = 1\n"]
    envs.close()


def test_an_unknown_render_mode_is_refused():
    with pytest.raises(ValueError, match="render_mode"):
        Speedrun(TINY, render_mode="rgb_array")


def test_an_unknown_sandbox_is_refused():
    with pytest.raises(ValueError, match="auto, bubblewrap, plain"):
        Speedrun(TINY, sandbox="chroot")


def test_the_first_observation_is_the_task(make):
    env = make()
    observation, info = env.reset(seed=5)
    assert TIER.task in observation["text"]
    assert f"start slow {START:g} steps" in observation["text"]
    assert observation["scores"].tolist() == [0, 1, 0, 0, 0, 0]
    assert observation["budget"].tolist() == pytest.approx([1] * len(METERS), abs=1e-3)
    assert observation["scores"].dtype == observation["budget"].dtype == np.float32
    assert set(info) == INFO


def test_scores_follow_the_runs_and_verdicts(make):
    env = make()
    env.step(Run(horizon=100))
    observation, *_ = env.step(CLAIM)
    scores = dict(zip(SCORES, observation["scores"].tolist(), strict=True))
    assert scores == pytest.approx(
        {
            "recovered": share(60),
            "best_steps_share": 60 / START,
            "val_loss": 4.5,
            "train_loss": 4.51,
            "last_accepted": 1,
            "submissions": 1,
        }
    )
    left = dict(zip(METERS, observation["budget"].tolist(), strict=True))
    assert left["runs"] == pytest.approx(49 / 50)
    assert left["submissions"] == pytest.approx(4 / 5)


def test_info_has_stable_keys_and_fresh_objects(make):
    env = make(FakeBackend(hidden_losses([4.5] * (ACCEPTED_N + 1) + [5.2] * 2)))
    expected = [
        (ReadFile(), set()),
        ("garbage", {"error"}),
        (Run(horizon=100), {"run"}),
        (Run(horizon=10**8), {"error"}),
        (CLAIM, {"verdict"}),
        (CLAIM, {"verdict"}),
        (Submit(claim=50, horizon=60), {"verdict"}),
        (Poll(handle="run-1"), {"run"}),
        (Poll(handle="run-9"), {"error"}),
        (Stop(), set()),
    ]
    infos = []
    for action, more in expected:
        infos.append(env.step(action)[4])
        assert set(infos[-1]) == INFO | more, action
    assert set(infos[2]["run"]) == {"handle", "done", *RunResult.model_fields}
    for a, b in itertools.pairwise(infos):
        assert a is not b
        assert a["budget"] is not b["budget"]
        assert a["running"] is not b["running"]
        assert a["budget"]["runs"] is not b["budget"]["runs"]
    assert infos[4]["verdict"] is not infos[5]["verdict"]
    json.dumps(infos)


def test_what_an_agent_does_to_an_observation_changes_nothing(make):
    env = make()
    observation, _, _, _, info = env.step(ReadFile(path="task.md"))
    observation["scores"][:] = 7
    info["budget"]["runs"]["spent"] = -100
    info["running"].append("run-7")
    observation, _, _, _, info = env.step(ReadFile(path="task.md"))
    assert observation["scores"].tolist() == [0, 1, 0, 0, 0, 0]
    assert info["budget"]["runs"]["spent"] == 0
    assert info["running"] == []


def test_history_is_what_was_done_and_seen(make):
    env = make()
    seen = [env.step(a)[0]["text"] for a in (ReadFile(path="task.md"), "garbage", Note(text="idea"))]
    assert env.history == list(zip(["read_file", "malformed", "note"], seen, strict=True))
    env.reset()
    assert env.history == []


def test_render_ansi_is_the_state(make):
    env = make(render_mode="ansi")
    do(env, Run(horizon=100), CLAIM)
    text = env.render()
    assert "frontier: 60 steps (submission-1)" in text
    assert f"recovered {share(60):.4f}" in text
    assert "runs: 1 of 50 spent" in text
    assert f"last verdict: submission-1 claim 60: accepted: the reruns' mean loss is below the target (n = {ACCEPTED_N})" in text  # noqa: E501  # fmt: skip


def test_render_human_prints_every_step(make, capsys):
    env = make(render_mode="human")
    assert TIER.task in capsys.readouterr().out
    env.step(Note(text="x"))
    out = capsys.readouterr().out
    assert "noted" in out and "frontier" in out
    assert env.render() is None
    assert capsys.readouterr().out == ""


def test_without_a_render_mode_nothing_is_printed(make, capsys):
    env = make()
    do(env, Run(horizon=100), CLAIM, Stop())
    assert env.render() is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "form",
    [
        lambda i: ReadFile(path="optimizer.py"),
        lambda i: EditFile(path="optimizer.py", old=f"0.0{4 + i}", new=f"0.0{5 + i}"),
    ],
    ids=["read", "edit"],
)
def test_a_step_that_does_not_train_is_fast(make, form):
    env = make(budget={"episode_steps": 1e4})
    env.step(WriteFile(path="optimizer.py", text=SLOW.replace("0.004", "0.04")))
    seconds = []
    for i in range(100):
        action = form(i)
        began = time.perf_counter()
        result = env.step(action)
        seconds.append(time.perf_counter() - began)
        assert "error" not in result[4]
    assert statistics.median(seconds) < 0.005  # meant: under a millisecond


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
    tokens, flops = 80 * TIER.tokens_per_step(), 80 * TIER.flops_per_step()
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


@pytest.mark.parametrize("reason", ["rule_error", "deadline", "rule_too_slow"])
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
        ("flops", 100 * TIER.flops_per_step()),
        ("tokens", 100 * TIER.tokens_per_step()),
    ],
)
@pytest.mark.parametrize("share_of_a_run", [0.0, 0.5, 0.9])
def test_a_run_that_the_budget_cannot_pay_is_refused(make, meter, one_run, share_of_a_run):
    backend = FakeBackend(lambda job, number: ran(job, 4.5, 1.0, flops=job.steps * TIER.flops_per_step()))
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
    assert info["run"] == {"handle": "run-1", "done": False}
    assert "running, step 1 of 100" in observation["text"]
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


def interrupt(n, handle):
    raise KeyboardInterrupt


def test_an_interrupt_cancels_and_charges_the_run_waited_for(make):
    env = make(backend := FakeBackend(hold={1}))
    env.on_progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        env.step(Run(horizon=100))
    assert backend.runs[0].cancelled
    assert spent(env, "device_seconds") == 0.25
    assert nothing_reserved(env)
    assert do(env, ReadFile())[4]["running"] == []


def test_an_interrupted_submission_is_undecided(make):
    env = make(backend := FakeBackend(hold={1, 2}))
    env.on_progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        env.step(CLAIM)
    assert all(run.cancelled for run in backend.runs)
    assert spent(env, "submissions") == 0
    env.on_progress = lambda n, handle: None
    verdict = do(env, CLAIM)[4]["verdict"]
    assert verdict["accepted"] and not verdict["cached"]
    assert replay(env.episode.ledger.path).differences == []


# --- submissions and rewards ---


def test_the_reward_is_the_increment_of_what_is_recovered(make):
    env = make()
    rewards = [do(env, Submit(claim=claim, horizon=90))[1] for claim in (80, 60, 55)]
    assert rewards == pytest.approx([share(80), share(60) - share(80), share(55) - share(60)])
    assert sum(rewards) == pytest.approx(env.episode.recovered) == pytest.approx(share(55))
    assert env.episode.best_submission == "submission-3"


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
    assert "rejected" in observation["text"]
    assert info["best_steps"] == 60
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
    assert info["best_steps"] == 60


def test_a_claim_beyond_the_start_record_never_costs(make):
    env = make()
    claim = math.ceil(START) + 1
    _, reward, _, _, info = do(env, Submit(claim=claim, horizon=claim))
    assert info["verdict"]["accepted"]
    assert (reward, info["recovered"], info["best_steps"]) == (0, 0, START)


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
        - margin_for_power(TIER.test(), TIER.measured.sigma, power)
        + TIER.measured.shard_offset
    )
    env = make(FakeBackend(lambda job, number: loss))
    observation, _, _, _, info = do(env, Run(horizon=100), Submit())
    assert info["error"] == "ActionError"
    assert text in observation["text"]
    assert spent(env, "submissions") == 0


def test_a_failed_run_supports_no_claim(make):
    env = make(FakeBackend(lambda job, number: ran(job, 4.5, reason="rule_error")))
    assert do(env, Run(horizon=100), Submit())[4]["error"] == "ActionError"


# --- how an episode ends ---


def test_stop_terminates(make):
    env = make()
    _, reward, terminated, truncated, info = do(env, Note(text="x"), Stop())
    assert (reward, terminated, truncated) == (0, True, False)
    assert lines(env, "end")[0]["reason"] == "stopped by the agent"
    assert set(info) == INFO


@pytest.mark.parametrize("action", [{"type": "stop", "now": 1}, "stop", '{"type": "Stop"}'])
def test_a_malformed_stop_does_not(make, action):
    env = make()
    _, _, terminated, truncated, info = do(env, action)
    assert not terminated and not truncated
    assert info["error"] == "ActionError"


def test_spent_steps_truncate(make):
    env = make(budget={"episode_steps": 2})
    assert do(env, Note(text="x"))[2:4] == (False, False)
    observation, _, terminated, truncated, _ = do(env, Note(text="x"))
    assert (terminated, truncated) == (False, True)
    assert "The episode is over: episode_steps is spent." in observation["text"]
    assert lines(env, "end")[0]["reason"] == "budget spent: episode_steps"


def test_stop_at_the_last_step_is_the_agents(make):
    env = make(budget={"episode_steps": 1})
    assert do(env, Stop())[2:4] == (True, False)


def test_spent_time_truncates(make, monkeypatch):
    env = make()
    budget = env.episode.budget
    now = [budget._clock()]
    monkeypatch.setattr(budget, "_clock", lambda: now[0])
    now[0] += 3500
    assert do(env, Note(text="x"))[2:4] == (False, False)
    now[0] += 101
    assert do(env, Note(text="x"))[2:4] == (False, True)
    assert lines(env, "end")[0]["reason"] == "budget spent: wall_seconds"


@pytest.mark.parametrize("loss", [4.5, 5.2])
def test_the_last_submission_truncates_after_it_is_paid(make, loss):
    env = make(FakeBackend(lambda job, number: loss), budget={"submissions": 1})
    _, reward, terminated, truncated, _ = do(env, CLAIM)
    assert (terminated, truncated) == (False, True)
    assert reward == (pytest.approx(share(60)) if loss < 5 else 0)


def test_a_spent_research_budget_ends_nothing(make):
    env = make(budget={"runs": 1, "device_seconds": 1, "tokens": 1e5, "flops": 1e12})
    assert do(env, Run(horizon=100), Note(text="x"))[2:4] == (False, False)


def test_before_and_after_an_episode_there_is_no_step(make, tmp_path):
    fresh = Speedrun(TINY, backend=FakeBackend(), state_dir=tmp_path)
    for use in (lambda: fresh.step(Stop()), lambda: fresh.checkpoint(), lambda: fresh.fork()):
        with pytest.raises(gymnasium.error.ResetNeeded):
            use()
    env = make()
    kept = env.checkpoint()
    do(env, Stop())
    for use in (lambda: env.step(ReadFile()), lambda: env.restore(kept), lambda: env.fork()):
        with pytest.raises(gymnasium.error.ResetNeeded, match="stopped by the agent"):
            use()
    env.reset()
    assert do(env, ReadFile())[2:4] == (False, False)


def test_closing_twice_is_harmless_and_ends_the_episode(make):
    env = make(backend := FakeBackend(hold={1}))
    do(env, Run(horizon=100, wait=False))
    env.close()
    env.close()
    assert backend.runs[0].cancelled
    assert lines(env, "end")[0]["reason"] == "closed"
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(ReadFile())


def test_closing_on_a_full_disk_still_closes_the_backend(make, monkeypatch):
    env = make(backend := FakeBackend())

    def full(*_, **__):
        raise LedgerError("no space")

    monkeypatch.setattr(env.episode.ledger, "append", full)
    with pytest.raises(LedgerError, match="no space"):
        env.close()
    assert backend.closed == 1


def test_reset_ends_the_episode_before_it(make):
    env = make(backend := FakeBackend(hold={1}))
    do(env, Run(horizon=100, wait=False), WriteFile(path="optimizer.py", text=FAST))
    first = env.episode
    _, info = env.reset()
    assert backend.runs[0].cancelled
    assert first.over == "reset"
    assert info["episode"] != first.id
    assert info["budget"]["runs"]["spent"] == 0
    assert env.workspace.files == {"optimizer.py": SLOW}


# --- options ---


def test_reset_takes_start_anchor_and_budget(make, tmp_path):
    folder = tmp_path / "three"
    shutil.copytree(TINY, folder)
    (folder / "calibration.json").unlink()
    shutil.copytree(folder / "records" / "slow", folder / "records" / "middle")
    tier = load_tier(folder, calibrated=False)
    c = TIER.measured
    middle = c.records["slow"].model_copy(update={"value": 75.0})
    c = c.model_copy(update={"fingerprint": tier.fingerprint(), "records": {**c.records, "middle": middle}})
    (folder / "calibration.json").write_text(c.model_dump_json())
    env = make(tier=folder, start="middle", budget={"runs": 3})
    assert env.episode.start_steps == 75
    _, info = env.reset(options={"anchor": "middle", "start": "slow", "budget": {"submissions": 4, "runs": 2}})
    assert (env.episode.start_steps, env.episode.anchor_steps) == (START, 75)
    assert (info["budget"]["submissions"]["limit"], info["budget"]["runs"]["limit"]) == (4, 2)
    _, info = env.reset()
    assert (env.episode.start_steps, info["budget"]["runs"]["limit"]) == (75, 3)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"difficulty": 3}, ActionError, "unknown options difficulty; there are start, anchor, budget"),
        ({"budget": {"gpu_hours": 3}}, ActionError, "unknown meters gpu_hours"),
        ({"budget": {"runs": 0}}, ActionError, "positive and finite"),
        ({"budget": {"runs": math.nan}}, ActionError, "positive and finite"),
        ({"budget": {"runs": math.inf}}, ActionError, "positive and finite"),
        ({"budget": {"runs": "many"}}, ActionError, "positive and finite"),
        ({"budget": {"submissions": 6}}, ActionError, "lowered but not raised"),
        ({"start": "gpt-5"}, TierError, "it has slow, fast"),
        ({"start": "fast", "anchor": "slow"}, ActionError, "must be slower"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, options, error, text):
    env = make()
    with pytest.raises(error, match=text.replace("(", r"\(")):
        env.reset(options=options)


def test_a_tier_that_is_not_there_or_not_calibrated_is_refused(tmp_path):
    with pytest.raises(TierError, match="neither a folder"):
        Speedrun("tiny-wallclock")
    shutil.copytree(TINY, tmp_path / "tier")
    (tmp_path / "tier" / "calibration.json").unlink()
    with pytest.raises(TierError, match="tiers calibrate"):
        Speedrun(tmp_path / "tier")


def test_the_seed_of_reset_decides_no_rerun(make, tmp_path):
    seeds = []
    for _ in range(2):
        env = make(backend := FakeBackend())
        env.reset(seed=7)
        do(env, Run(horizon=100), CLAIM)
        seeds += [job.seed for job in backend.jobs]
    assert len(seeds) == len(set(seeds))


# --- checkpoints and forks ---


def test_restore_brings_files_notes_and_history_back_and_no_meter(make):
    env = make()
    do(env, Note(text="plan"), WriteFile(path="optimizer.py", text=FAST))
    kept = json.loads(json.dumps(env.checkpoint()))
    do(env, Run(horizon=100), CLAIM, WriteFile(path="optimizer.py", text="x = 1"), Note(text="worse"))
    env.restore(kept)
    assert env.workspace.files == {"optimizer.py": FAST}
    assert env.workspace.notes == "plan\n"
    assert [name for name, _ in env.history] == ["note", "write_file"]
    assert (spent(env, "runs"), spent(env, "submissions"), spent(env, "episode_steps")) == (1, 1, 6)
    assert env.episode.best == 60
    assert do(env, CLAIM)[4]["verdict"]["cached"] is True  # the verdict is still known
    assert do(env, Poll(handle="run-1"))[4]["run"]["done"]
    assert lines(env, "restore")


def test_a_checkpoint_is_no_window_into_the_environment(make):
    env = make()
    kept = env.checkpoint()
    kept["files"]["optimizer.py"] = "changed"
    kept["snapshots"].clear()
    assert env.workspace.files == {"optimizer.py": SLOW}
    assert do(env, Revert())[4].get("error") is None


def test_a_checkpoint_of_another_episode_is_refused(make):
    env = make()
    kept = env.checkpoint()
    env.reset()
    with pytest.raises(ActionError, match="the checkpoint is of episode"):
        env.restore(kept)


def test_a_fork_has_its_own_workspace_and_shares_the_account(make):
    env = make(backend := FakeBackend())
    do(env, Note(text="plan"), Run(horizon=100))
    twin = env.fork()
    assert (twin.history, twin.workspace.notes) == (env.history, "plan\n")
    assert twin.workspace.files == env.workspace.files
    do(twin, WriteFile(path="optimizer.py", text=FAST), Note(text="mine"))
    assert env.workspace.files == {"optimizer.py": SLOW}
    assert env.workspace.notes == "plan\n"
    do(twin, Run(horizon=100))
    assert spent(env, "runs") == 2
    assert do(twin, CLAIM)[1] == pytest.approx(share(60))
    _, reward, _, _, info = do(env, Submit(claim=70, horizon=70))
    assert (reward, info["best_steps"]) == (0, 60)  # the parent is paid for what beats the fork only
    started = len(backend.jobs)
    _, reward, _, _, info = do(env, WriteFile(path="optimizer.py", text=FAST), CLAIM)
    assert (reward, info["verdict"]["cached"]) == (0, True)
    assert len(backend.jobs) == started
    assert do(twin, ReadFile())[4]["budget"]["submissions"]["spent"] == 2
    assert do(twin, Revert())[4].get("error") is None


def test_closing_a_fork_leaves_the_episode_alone(make):
    env = make(backend := FakeBackend(hold={1}))
    do(env, Run(horizon=100, wait=False))
    twin = env.fork()
    twin.close()
    assert (backend.closed, env.episode.over) == (0, "")
    do(env, ReadFile())
    twin = env.fork()
    twin.reset()  # from here on it has an episode of its own, on the shared backend
    assert twin.episode is not env.episode
    assert env.episode.over == ""
    twin.close()
    assert (backend.closed, twin.episode.over) == (0, "closed")
    assert do(env, ReadFile())[4]["running"] == ["run-1"]


def test_the_end_of_the_episode_is_that_of_its_forks(make):
    env = make()
    twin = env.fork()
    do(twin, Stop())
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(ReadFile())


# --- what is kept ---


def test_evidence_is_sealed_and_complete(make):
    env = make(backend := FakeBackend(hidden_losses([4.5, 4.51, 4.52, 4.53, 4.54, 4.55])))
    do(env, CLAIM)
    path = env.episode.folder / "evidence" / "submission-1.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(env.episode.ledger.path.stat().st_mode) == 0o600
    evidence = json.loads(path.read_text())
    n = env.episode.verdicts[0].n
    assert [r["seed"] for r in evidence["reruns"]] == [job.seed for job in backend.jobs[:n]]
    assert [r["loss"] for r in evidence["reruns"]] == [4.5, 4.51, 4.52, 4.53, 4.54, 4.55][:n]
    assert evidence["source"] == SLOW
    assert evidence["snapshot"] == env.workspace.snapshot
    assert (evidence["claim"], evidence["horizon"], evidence["accepted"]) == (60, 60, True)
    assert evidence["test"] == pytest.approx(vars(TIER.test()))
    assert evidence["versions"] and evidence["hardware"] and evidence["sandbox"]["name"] == "fake"


def test_nothing_that_the_agent_sees_tells_a_rerun_apart(make):
    losses = [4.50137, 4.51337, 4.52637, 4.53937, 4.54337, 4.55737]
    env = make(backend := FakeBackend(hidden_losses(losses)))
    observation, _, _, _, info = do(env, CLAIM)
    seen = observation["text"] + json.dumps(info) + json.dumps(env.checkpoint()) + do(env, ReadFile())[0]["text"]
    for job, loss in zip(backend.jobs, losses, strict=False):
        assert job.seed[:10] not in seen
        assert f"{loss:.3f}" not in seen


def test_the_ledger_replays_to_the_same_rewards(make):
    env = make(FakeBackend(hidden_losses([4.5] * (ACCEPTED_N + 1) + [5.2, 5.2] + [4.5] * 8)))
    claims = [CLAIM, Submit(claim=40, horizon=60), CLAIM, Submit(claim=55, horizon=60)]
    rewards = [do(env, Run(horizon=100), claim)[1] for claim in claims]
    do(env, Stop())
    path = env.episode.ledger.path
    found = replay(path)
    assert found.differences == []
    assert found.total_reward == pytest.approx(sum(rewards)) == pytest.approx(share(55))
    assert (found.best, found.recovered) == (55, pytest.approx(share(55)))
    assert [s["accepted"] for s in found.submissions] == [True, False, True]
    # and disagrees once somebody has changed a loss
    text = path.read_text()
    assert text.count('"loss": 5.2') == 1
    path.write_text(text.replace('"loss": 5.2', '"loss": 4.2'))
    assert replay(path).differences


def test_the_ledger_has_every_action_charge_and_run(make):
    env = make(hold_first := FakeBackend(hold={1}))
    do(env, Run(horizon=100, wait=False), "garbage", Cancel(handle="run-1"), Run(horizon=100, seed=3), CLAIM, Stop())
    assert len(hold_first.jobs) > 2
    assert [line["type"] for line in lines(env, "action")] == ["run", "malformed", "cancel", "run", "submit", "stop"]
    assert [line["error"] for line in lines(env, "action")] == ["", "ActionError", "", "", "", ""]
    assert [line["exit_reason"] for line in lines(env, "run")] == ["cancelled", "completed"]
    assert [line["handle"] for line in lines(env, "charge")] == ["run-1", "run-2", "submission-1"]
    assert lines(env, "charge")[1]["spent"] == {m: spent(env, m) for m in RUN_METERS}
    assert lines(env, "episode")[0]["fingerprint"] == TIER.fingerprint()
    assert len(lines(env, "rerun")) == lines(env, "verdict")[0]["n"]


def test_a_point_that_is_not_finite_does_not_stop_the_episode(make):
    points = ((50, math.nan), (80, math.inf), (100, 4.5))
    env = make(FakeBackend(lambda job, number: ran(job, 4.5, val_points=points)))
    do(env, Run(horizon=100), Submit(horizon=100))
    assert lines(env, "run")[0]["val_points"] == [[50, None], [80, None], [100, 4.5]]


# --- the scripted agent ---


def test_the_ladder_agent_climbs_and_claims_too_much_once(make):
    crossing = {"slow": TIER.measured.records["slow"].steps_mean, "fast": TIER.measured.records["fast"].steps_mean}

    def script(job, number):
        name = "slow" if job.source == SLOW else "fast"
        return TIER.table.training.target - 0.05 * (job.steps - crossing[name])

    env = make(FakeBackend(script))
    played = play(env, LadderAgent(env.tier))
    assert [v["accepted"] for v in played.verdicts] == [False, True]
    overclaim, claim = (v["claim"] for v in played.verdicts)
    assert overclaim < crossing["fast"] < claim
    assert played.total_reward == pytest.approx(share(claim))
    assert [run["exit_reason"] for run in played.runs] == ["completed", "completed"]
    assert played.info["recovered"] == pytest.approx(played.total_reward)


def test_play_stops_when_our_side_fails(make):
    env = make(FakeBackend(lambda job, number: LOST))
    with pytest.raises(BackendError, match="node lost"):
        play(env, LadderAgent(env.tier))


def test_the_package_says_what_it_exports():
    assert sorted(nanogpt_env.__all__) == sorted(set(nanogpt_env.__all__))
    assert all(hasattr(nanogpt_env, name) for name in nanogpt_env.__all__)

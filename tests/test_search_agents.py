"""Agents that search among numbers, on a landscape that is known: what they find, submit and spend."""

import math
import sys

import pytest
from fakes import FakeBackend, ran
from test_cli import call, call_json, refused

from nanogpt_env import ActionError, Speedrun, literals
from nanogpt_env.agents import AGENTS, find_agent, play
from nanogpt_env.compare import at, compare, summarize
from nanogpt_env.tiers import load_tier

TIER = load_tier("nano-steps")
BEST = {"LEARNING_RATE": 0.01, "WARMUP_STEPS": 20, "betas[0]": 0.85, "betas[1]": 0.98, "weight_decay": 0.05}
SEARCHES = [name for name in AGENTS if name != "ladder"]


def need(source):
    """Steps to the target: 190 at the best numbers, 270 at the start record's."""
    away = sum(math.log(n.value / BEST[n.name]) ** 2 for n in literals.find(source))
    return 190 * math.exp(0.3 * away)


def landscape(job, number):
    return TIER.table.training.target + 0.4 * math.log(need(job.source) / job.steps)


def played(name, tmp_path, seed=1, script=landscape, **budget):
    env = Speedrun("nano-steps", backend=FakeBackend(script), state_dir=tmp_path, budget={"runs": 24, **budget})
    agent = AGENTS[name](env.tier, seed=seed)
    try:
        return play(env, agent), agent, env
    finally:
        env.close()


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_gets_better_and_has_it_verified(name, tmp_path):
    result, agent, env = played(name, tmp_path, runs=40)
    assert agent.best.need < agent.tried[0].need
    assert result.info["budget"]["runs"]["left"] <= 4
    assert result.info["recovered"] == pytest.approx(result.total_reward)
    if name != "random":  # which may find nothing
        assert result.verdicts[-1]["accepted"]
        assert result.info["recovered"] > 0
    # what was accepted is what the landscape gives
    assert result.info["best"] >= 0.97 * min(need(t.source) for t in agent.tried)
    assert env.episode.active == []


@pytest.mark.parametrize("name", ["greedy", "bayes"])
def test_searches_that_learn_beat_chance(name, tmp_path):
    chance = [played("random", tmp_path, seed)[0].info["recovered"] for seed in range(3)]
    found = [played(name, tmp_path, seed)[0].info["recovered"] for seed in range(3)]
    assert sum(found) > sum(chance)


@pytest.mark.parametrize("name", SEARCHES)
def test_nothing_is_submitted_where_nothing_is_better(name, tmp_path):
    result, _, _ = played(name, tmp_path, script=lambda job, number: 9.0)
    assert result.verdicts == []
    assert result.info["recovered"] == 0
    assert result.steps[-1]["type"] == "stop"


def test_runs_that_fail_are_no_results(tmp_path):
    def script(job, number):
        return landscape(job, number) if number % 2 else ran(job, 9.0, reason="nonfinite_loss")

    for name in SEARCHES:
        result, agent, _ = played(name, tmp_path, script=script)
        assert all(t.loss < 9 for t in agent.tried), name
        assert result.steps[-1]["type"] == "stop"


@pytest.mark.parametrize("name", SEARCHES)
def test_without_a_run_of_the_start_program_it_stops(name, tmp_path):
    result, agent, _ = played(name, tmp_path, script=lambda job, number: ran(job, 9.0, reason="deadline"))
    assert agent.tried == []
    assert [step["type"] for step in result.steps] == ["write_file", "run", "stop"]


def test_the_same_seed_tries_the_same(tmp_path):
    for name in ("greedy", "bayes"):
        (_, a, _), (_, b, _) = (played(name, tmp_path, seed=3) for _ in range(2))
        assert [t.moves for t in a.tried] == [t.moves for t in b.tried]


def test_forks_run_side_by_side(tmp_path):
    backend = FakeBackend(landscape)
    env = Speedrun("nano-steps", backend=backend, state_dir=tmp_path, budget={"runs": 20})
    play(env, AGENTS["best-of"](env.tier, seed=0))
    env.close()
    assert backend.most_at_once >= 2


# --- by name, and from the command line ---

OWN = '''
from nanogpt_env import EditFile, Run, Stop, Submit

class Mine:
    """Twice the learning rate: run it until a claim can be made."""

    def __init__(self, tier):
        self.plan = [EditFile(path="optimizer.py", old="lr=0.004", new="lr=0.008"), Run(horizon=60), Run(horizon=60)]
        self.plan += [Submit(horizon=60), Stop()]

    def act(self, observation, info):
        return self.plan.pop(0)
'''


def test_a_malformed_action_is_told_to_the_agent(tmp_path):
    (tmp_path / "clumsy.py").write_text(
        "class Clumsy:\n    def __init__(self, tier):\n        self.plan = [{'type': 'jump'}, 7, {'type': 'stop'}]\n"
        "    def act(self, observation, info):\n        return self.plan.pop(0)\n"
    )
    done = call("play", "--agent", "clumsy:Clumsy", "--output", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> malformed") == 2 and "> stop" in done.stdout


def test_what_an_agent_raises_leaves_an_episode_to_go_on_with(tmp_path):
    def played(answer, *more):
        (tmp_path / "hasty.py").write_text(
            "from nanogpt_env import Stop\nclass Hasty:\n    def __init__(self, tier):\n        pass\n"
            f"    def act(self, observation, info):\n        return {answer}\n"
        )
        return call("play", "--agent", "hasty:Hasty", "--output", tmp_path / "out", *more, cwd=tmp_path)

    done = played("{}['what it wanted']")
    refused(done, "the agent raised KeyError('what it wanted') (", "hasty.py, line 6)")
    done = played("Stop()", "--resume", done.stderr.split("--resume ")[1].splitlines()[0])
    assert done.returncode == 0, done.stderr
    assert call_json("replay", tmp_path / "out")["notes"] == []


def test_without_optuna_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr("nanogpt_env.agents.search.util.find_spec", lambda name: None)
    with pytest.raises(ActionError, match=r"nanogpt_env\[agents,train\]"):
        AGENTS["bayes"](TIER)


def test_an_agent_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    from conftest import TINY

    found = call_json(
        "play", "--tier", TINY, "--agent", "mine:Mine", "--budget", "runs=5", "--output", tmp_path / "out"
    )
    assert found["agent"] == "mine:Mine"
    assert found["budget"]["runs"] == {"limit": 5, "spent": 2, "left": 3}


@pytest.mark.parametrize(
    ("name", "why"),
    [("nobody", "it is one of ladder, random"), ("nowhere:Agent", "cannot be imported"), ("math:Agent", "imported"),
     ("..:x", "cannot be imported")],
)  # fmt: skip
def test_agents_that_are_not_there(name, why):
    with pytest.raises(ActionError, match=why):
        find_agent(name)


@pytest.mark.parametrize("budget", ["runs", "runs=many", "=3", "sandwiches=3", "runs=-1"])
def test_budgets_that_make_no_sense(budget, tmp_path):
    done = call("play", "--tier", "nano-steps", "--budget", budget, "--output", tmp_path)
    assert done.returncode == 2
    assert "budget" in done.stderr or "meters" in done.stderr


# --- comparisons ---


def test_a_comparison_goes_on_where_it_was(tmp_path, monkeypatch):
    made = []

    def speedrun(tier, **options):
        backend = FakeBackend(landscape)
        made.append(backend)
        return Speedrun("nano-steps", **options | {"backend": backend})

    monkeypatch.setattr("nanogpt_env.compare.Speedrun", speedrun)
    seen = []
    first = compare("nano-steps", ["random", "greedy"], 2, tmp_path, {"runs": 12}, report=lambda *a: seen.append(a))
    assert [(e.agent, e.episode) for e in first] == [("random", 0), ("greedy", 0), ("random", 1), ("greedy", 1)]
    assert seen[-1] == ("episodes", 4, 4)
    runs = len(made[0].runs)
    more = compare("nano-steps", ["random", "greedy"], 3, tmp_path, {"runs": 12})
    assert more[:4] == first
    assert len(made[1].runs) < runs
    other = compare("nano-steps", ["random"], 1, tmp_path, {"runs": 6})
    assert other[0] != first[0]
    for entry in first:
        assert sum(entry.runs.values()) == 12
        assert entry.runs["algorithm"] == 0 and entry.runs["numbers"] >= 8
        assert at(entry, 0) == 0 and at(entry, 1e9) == entry.recovered
        assert 0 <= entry.idle_seconds < entry.wall_seconds
        assert entry.device_seconds["verification"] > 0 or entry.submissions == 0
    rows = {row.agent: row for row in summarize(more)}
    low, high = rows["greedy"].interval
    assert low <= rows["greedy"].recovered <= high
    assert rows["greedy"].episodes == 3


def test_compare_from_the_command_line(tmp_path):
    from conftest import TINY

    options = ["--tier", TINY, "--agents", "greedy,ladder", "--episodes", "1", "--output", tmp_path]
    options += ["--budget", "runs=4", "--budget", "submissions=1"]
    found = call_json("compare", *options)
    assert [row["agent"] for row in found["agents"]] == ["greedy", "ladder"]
    assert found["budget"] == {"runs": 4, "submissions": 1}
    assert (tmp_path / "compare.png").stat().st_size > 1000
    done = call("compare", *options)  # from what is there
    assert done.returncode == 0
    assert "recovered" in done.stdout and "on verification; idle" in done.stdout
    (tmp_path / "episodes.jsonl").write_text("{}\n")
    done = call("compare", *options)
    assert done.returncode == 2 and "choose another folder" in done.stderr

"""The example agents of two providers, by their own SDKs, against a local server that speaks both wire formats."""

import json
from pathlib import Path

import pytest
from fakes import FakeBackend
from model_server import Fails, Says, serving
from test_cli import call
from test_search_agents import landscape
from test_wrappers import BETTER

from nanogpt_env import Speedrun
from nanogpt_env.agents import find_agent, play
from nanogpt_env.agents.language import CUT, PLAN, THREAD
from nanogpt_env.errors import ActionError, AgentError
from nanogpt_env.ledger import read_ledger
from nanogpt_env.wrappers import Settings

EXAMPLES = Path(__file__).parents[1] / "examples"
PROVIDERS = ["anthropic_agent:AnthropicAgent", "openai_agent:OpenAIAgent"]
pytestmark = pytest.mark.parametrize("provider", PROVIDERS)


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("ANTHROPIC_API_KEY", "none")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def env(tmp_path):
    env = Speedrun("nano-steps", backend=FakeBackend(landscape), state_dir=tmp_path)
    yield env
    env.close()


SOURCE, CLAIM = Settings(Speedrun("nano-steps", backend=FakeBackend()).tier).program(BETTER)
WRITE = ("write_file", {"path": "optimizer.py", "text": SOURCE})
RUN = ("run", {"horizon": CLAIM})
SUBMIT = ("submit", {"claim": CLAIM, "horizon": CLAIM})
STOP = Says("Done.", [("stop", {})])


def base(server, provider):
    return server.url + ("/v1" if "openai" in provider else "")


def agent_of(server, env, provider, **options):
    options = {"model": "m", "base_url": base(server, provider), **options}
    return find_agent(provider, options)(env.tier)


def texts(request):
    """All that a request shows the model, as one text."""
    return json.dumps(request["messages"])


def test_an_episode_to_a_verified_reward(provider, env):
    script = Says("I raise the rate.", [WRITE, RUN]), Says(calls=[SUBMIT]), STOP
    with serving(*script) as server:
        agent = agent_of(server, env, provider)
        played = play(env, agent)
    assert [s["type"] for s in played.steps] == ["write_file", "run", "submit", "stop"]
    assert played.info["recovered"] > 0.3
    first, second, third = server.requests
    assert "val_loss" in texts(second) and "submission-1" in texts(third)
    assert vars(agent.spent) == {"replies": 3, "input_tokens": 300, "output_tokens": 30, "dollars": 0}
    names = {t.get("name") or t["function"]["name"] for t in first["tools"]}
    assert {"run", "submit", "write_notes", "stop"} <= names
    assert {r["model"] for r in server.requests} == {"m"} and all(r["stream"] for r in server.requests)


def test_every_call_has_its_result(provider, env):
    """As both formats demand, also for calls that are answered without the environment."""
    calls = [("run", "[1]"), ("write_notes", {"file": PLAN, "text": "x"}), ("dance", {}), ("read_file", {})]
    if provider == PROVIDERS[0]:
        calls[0] = ("run", {"horizon": "soon"})  # this SDK itself refuses what is no object
    with serving(Says(calls=calls), STOP) as server:
        play(env, agent_of(server, env, provider))
    messages = server.requests[1]["messages"]
    if provider == PROVIDERS[0]:
        results = {b["tool_use_id"]: b["content"] for b in messages[-1]["content"]}
        assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    else:
        results = {m["tool_call_id"]: m["content"] for m in messages if m["role"] == "tool"}
    assert set(results) == {f"call-{i}" for i in range(4)}
    assert "refused" in results["call-0"] and "refused" in results["call-2"]
    assert results["call-1"] == f"wrote {PLAN}" and "optimizer.py" in results["call-3"]


def test_refusals_are_waited_out(provider, env):
    script = Fails(429, {"retry-after": "1"}), Fails(529), Fails(503), STOP
    with serving(*script) as server:
        play(env, agent_of(server, env, provider))
    assert len(server.requests) == 4


def test_retry_after_is_respected(provider, env, monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    with serving(Fails(429, {"retry-after": "37"}), STOP) as server:
        play(env, agent_of(server, env, provider))
    assert 37 in waited


@pytest.mark.parametrize("how", ["cut", "overloaded"])
def test_a_reply_that_breaks_off_is_asked_for_again(how, provider, env, capsys):
    broken = Says("I think", [RUN], **{how: True})
    with serving(broken, broken, Says(calls=[RUN]), STOP) as server:
        played = play(env, agent_of(server, env, provider))
    assert [s["type"] for s in played.steps] == ["run", "stop"]
    assert len(played.runs) == 1
    assert capsys.readouterr().err.count("broke off") == 2


def test_a_model_that_stays_away_is_an_error(provider, env):
    with serving(Says("x", cut=True)) as server, pytest.raises(AgentError, match="cannot be asked"):
        play(env, agent_of(server, env, provider))
    assert len(server.requests) == 6
    with serving(Fails(401)) as server, pytest.raises(AgentError, match="AuthenticationError"):
        play(env, agent_of(server, env, provider))
    assert len(server.requests) == 1


def test_tokens_are_limited(provider, env):
    reading = Says(calls=[("read_file", {"path": "task.md"})], tokens=(3000, 500))
    with serving(reading) as server:
        agent = agent_of(server, env, provider, tokens=20_000)
        played = play(env, agent)
    assert played.steps[-1]["type"] == "stop"
    spent = agent.spent.input_tokens + agent.spent.output_tokens
    assert 10_000 < spent <= 20_000
    limits = [r.get("max_tokens") or r["max_completion_tokens"] for r in server.requests]
    assert limits == sorted(limits, reverse=True) and limits[0] == 8192 > limits[-1]


def test_dollars_are_limited(provider, env):
    reading = Says(calls=[("read_file", {"path": "task.md"})], tokens=(30_000, 1000))
    with serving(reading) as server:
        agent = agent_of(server, env, provider, dollars=1.0, input_price=3, output_price=15)
        play(env, agent)
    assert 0.6 < agent.spent.dollars <= 1.0
    assert agent.spent.dollars == pytest.approx(len(server.requests) * (0.09 + 0.015))
    with pytest.raises(AgentError, match="input_price"):
        agent_of(server, env, provider, dollars=1.0)


def test_a_silent_model_is_nudged_then_stopped(provider, env):
    with serving(Says("Hm.")) as server:
        played = play(env, agent_of(server, env, provider))
    assert [s["type"] for s in played.steps] == ["stop"]
    assert len(server.requests) == 4 and "Call a tool" in texts(server.requests[-1])


def test_a_full_context_is_cut_to_the_notes(provider, env):
    notes = [("write_notes", {"file": PLAN, "text": "raise the rate"}), ("write_notes", {"file": THREAD, "text": "t1"})]
    script = Says(calls=[WRITE, RUN]), Says(calls=[SUBMIT], tokens=(9000, 10)), Says(calls=notes), STOP
    with serving(*script) as server:
        agent = agent_of(server, env, provider, context=5000)
        played = play(env, agent)
    assert [s["type"] for s in played.steps] == ["write_file", "run", "submit", "stop"]
    asked, anew = server.requests[2:]
    assert CUT in texts(asked) and [t.get("name") or t["function"]["name"] for t in asked["tools"]] == ["write_notes"]
    assert "submission-1" in texts(asked), "the results of the last calls are shown before the cut"
    shown = texts(anew)
    assert "raise the rate" in shown and "t1" in shown
    assert [m["role"] for m in anew["messages"] if m["role"] != "system"] == ["user"]
    best = env.tier.format(played.info["best"])
    assert f"current best: {best}" in shown and "Every new best is to be beaten" in shown
    assert "Every new best is to be beaten" in (agent.notes / "goal.md").read_text()


def test_notes_have_their_places_only(provider, env):
    calls = [("write_notes", {"file": f, "text": "x"}) for f in ("goal.md", "../../out", "/etc/x", 7)]
    calls.append(("write_notes", {"file": PLAN, "text": 3}))
    with serving(Says(calls=calls), STOP) as server:
        agent = agent_of(server, env, provider)
        play(env, agent)
    assert texts(server.requests[1]).count("refused: file must be") == 5
    assert {p.name for p in agent.notes.rglob("*")} == {"goal.md", "spent.json"}


def test_it_goes_on_where_an_error_ended_it(provider, env, tmp_path):
    note = ("write_notes", {"file": PLAN, "text": "the rate is too low"})
    with serving(Says(calls=[note, WRITE, RUN], tokens=(5000, 100)), Fails(400)) as server:
        with pytest.raises(AgentError):
            play(env, agent_of(server, env, provider))
        env.leave()
    folder = env.episode.folder
    with serving(Says(calls=[SUBMIT]), STOP) as server:
        agent = agent_of(server, env, provider)
        played = play(env, agent, resume=folder)
    assert played.info["recovered"] > 0.3 and played.info["ledger"] == str(folder / "ledger.jsonl")
    assert "the rate is too low" in texts(server.requests[0])
    assert agent.spent.input_tokens == 5200
    kinds = [line["kind"] for line in read_ledger(folder / "ledger.jsonl")[0]]
    assert kinds.count("end") == 1 and kinds[-1] == "end"


def test_options_are_checked(provider, env):
    with pytest.raises(ActionError, match="colour"):
        find_agent("greedy", {"colour": 1})
    with serving(STOP) as server, pytest.raises(TypeError, match="colour"):
        agent_of(server, env, provider, colour=1)


def test_from_the_command_line(provider, tmp_path):
    """Left by an error of the model, gone on with, by real training on the tier of the tests."""
    tiny = Path(__file__).parent / "tiny-steps"

    def cli(server, *more):
        options = ["--set", "model=m", "--set", f"base_url={base(server, provider)}", "--output", tmp_path, *more]
        return call("play", "--tier", tiny, "--agent", provider, *options, cwd=EXAMPLES)

    with serving(Says(calls=[("run", {"horizon": 40})]), Fails(400)) as server:
        done = cli(server)
    assert done.returncode == 2, done.stderr
    assert "BadRequestError" in done.stderr and "Traceback" not in done.stderr
    folder = done.stderr.split("--resume ")[1].splitlines()[0]
    with serving(STOP) as server:
        done = cli(server, "--resume", folder)
    assert done.returncode == 0, done.stderr
    assert "> stop" in done.stdout and json.loads((Path(folder) / "agent/spent.json").read_text())["replies"] == 2

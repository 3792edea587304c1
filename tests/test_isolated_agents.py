"""An agent behind a socket: what it can say, what it cannot reach, and that nothing of it stays."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import TINY
from fakes import FakeBackend
from model_server import Fails, Says, serving
from processes import descendants, of_this_process
from test_cli import call
from test_search_agents import landscape

from nanogpt_env import Speedrun
from nanogpt_env.agents import play
from nanogpt_env.agents.isolation import IsolatedAgent
from nanogpt_env.agents.remote import MAX_LINE, RemoteAgent, public
from nanogpt_env.errors import ActionError, AgentError
from nanogpt_env.ledger import read_ledger

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def env(tmp_path):
    env = Speedrun("nano-steps", backend=FakeBackend(landscape), state_dir=tmp_path / "state")
    yield env
    env.close()


def isolated(env, tmp_path, monkeypatch, source, network=False, **options):
    """An agent of this source, in its sandbox."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "tried.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    return IsolatedAgent(env.tier, "tried:Agent", options, network)


ONE = """
class Agent:
    def __init__(self, tier): self.tier = tier; self.done = False
    def act(self, observation, info):
        if self.done: return {"type": "stop"}
        self.done = True
        return {"type": "note", "text": str(self.look(info))}
"""


def test_it_plays_as_it_would_here(env):
    agent = IsolatedAgent(env.tier, "greedy", {"seed": 1}, False)
    try:
        played = play(env, agent)
    finally:
        agent.close()
    assert played.info["recovered"] > 0
    assert played.verdicts[-1]["trusted"] is True
    assert env.episode.ledger.path.parent.joinpath("agent").is_dir()


LOOKS = {
    "the ledger": "pathlib.Path(info['ledger']).read_text()",
    "other processes": "[p for p in os.listdir('/proc') if p.isdigit() and int(p) > 9]",
    "the home folder": "[p for p in os.listdir(HOME) if not any(x.startswith(f'{HOME}/{p}') for x in SHOWN)]",
    "the records of the ladder": "[r.sources for n, r in self.tier.records.items() if n != 'adamw' and r.sources]",
    "the tiers": "__import__('nanogpt_env.tiers').tiers.load_tier('nano-steps').record('normuon').sources",
    "the trainer": "pathlib.Path(REPOSITORY + '/gpu_backend/trainer.py').read_text()",
    "the state of the environment": "os.listdir(STATE)",
    "writing into the package": "os.access(REPOSITORY + '/nanogpt_env', os.W_OK)",
    "writing beside its module": "pathlib.Path(__file__ + 'x').write_text('x')",
    "the network": "socket.create_connection(('127.0.0.1', PORT), 2).close() or 1",
    "keys": "{k: v for k, v in os.environ.items() if 'KEY' in k}",
    "keys of other processes": "[p for p in os.listdir('/proc') if p.isdigit() and b'secret' in environment(p)]",
    "settings of the host": "os.close(os.open('/proc/sys/kernel/core_pattern', os.O_RDWR)) or 1",
    "another installation": "list(pathlib.Path(sys.prefix).glob('lib/*/*/nanogpt_env*/_content/envs'))",
    "keyrings": "libc.syscall(250, 0, -3, 1) >= 0",
    "virtual machines": "socket.socket(40, socket.SOCK_STREAM).close() or 1",
    "tracing": "traced(subprocess.Popen(['sleep', '9']))",
    "outliving its parent": "libc.prctl(1, 0, 0, 0, 0) == 0",
    "a namespace of its own": "libc.unshare(0x10000000) == 0",
}


@pytest.mark.parametrize("what", LOOKS)
def test_what_it_cannot_reach(what, env, tmp_path, monkeypatch):
    """Each look gives nothing, or fails; `test_the_looks_see` makes the same ones without isolation."""
    with serving(Fails(500)) as server:
        agent = isolated(env, tmp_path, monkeypatch, looking(what, server, tmp_path))
        try:
            play(env, agent)
        finally:
            agent.close()
    assert json.loads(env.workspace.notes) in ("nothing", None) or "Error" in env.workspace.notes, env.workspace.notes


@pytest.fixture(autouse=True)
def a_process_with_a_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    process = subprocess.Popen(["sleep", "60"])
    yield
    process.kill()
    process.wait()


def looking(what, server, tmp_path):
    known = {"HOME": str(Path.home()), "REPOSITORY": str(EXAMPLES.parent), "STATE": str(tmp_path / "state")}
    known["SHOWN"] = [sys.base_prefix, str(EXAMPLES.parent)]
    known["PORT"] = int(server.url.rsplit(":", 1)[1])
    names = "\n".join(f"{name} = {value!r}" for name, value in known.items())
    look = f"""
    def look(self, info):
        import ctypes, json, os, pathlib, socket, subprocess, sys
        def environment(pid):
            try: return pathlib.Path(f"/proc/{{pid}}/environ").read_bytes()
            except OSError: return b""
        libc = ctypes.CDLL(None, use_errno=True)
        def traced(child):
            attached = libc.ptrace(16, child.pid, 0, 0) == 0
            child.kill()
            child.wait()
            return attached
        try: found = {LOOKS[what]}
        except BaseException as error: return json.dumps(f"Error: {{error!r}}")
        return json.dumps(repr(found)[:200] if found else "nothing")
"""
    return names + ONE + look


@pytest.mark.parametrize("what", list(LOOKS)[:-1])  # the last would take this process along
def test_the_looks_see(what, env, tmp_path, monkeypatch):
    """The same agent, not isolated, finds what it looks for: the test above can fail."""
    with serving(Fails(500)) as server:
        space = {"__file__": str(tmp_path / "tried.py")}
        exec(looking(what, server, tmp_path), space)
        env.reset()
        found = json.loads(space["Agent"](env.tier).look({"ledger": str(env.episode.ledger.path)}))
    assert found != "nothing" and "Error" not in found


def test_nothing_of_it_stays(env, tmp_path, monkeypatch):
    """Processes that it left behind, in sessions of their own."""
    look = """
    def look(self, info):
        import subprocess, sys
        sleeper = [sys.executable, "-c", "import time; time.sleep(999)"]
        for _ in range(3): subprocess.Popen(sleeper, start_new_session=True)
        return 1
"""
    before = of_this_process()
    agent = isolated(env, tmp_path, monkeypatch, ONE + look)
    play(env, agent)
    agent.close()
    deadline = time.monotonic() + 10
    while of_this_process() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert of_this_process() - before == set()
    assert not list(Path("/tmp").glob("nanogpt-agent-*"))


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("raise RuntimeError('broken')", "broken"),
        ("class Agent:\n    def __init__(self, tier): pass\n    def act(self, o, i): raise KeyError('lost')", "lost"),
        ("class Agent:\n    def __init__(self, tier): raise SystemExit(3)", "exit status 3"),
    ],
)
def test_an_agent_that_ends_is_an_error_that_says_why(source, why, env, tmp_path, monkeypatch):
    agent = isolated(env, tmp_path, monkeypatch, source)
    with pytest.raises(AgentError, match=why):
        play(env, agent)
    agent.close()


@pytest.mark.parametrize("name", ["no_such_module:Agent", "__main__:X", "..:x", ":"])
def test_modules_that_are_not_there(name, env):
    with pytest.raises(ActionError, match="no module"):
        IsolatedAgent(env.tier, name, {}, False)


@pytest.mark.parametrize("place", ["state", "modules/state"])
def test_modules_must_be_apart_from_what_is_hidden(place, tmp_path, monkeypatch):
    env = Speedrun("nano-steps", backend=FakeBackend(landscape), state_dir=tmp_path / place)
    agent = isolated(env, tmp_path, monkeypatch, ONE)
    if place == "state":
        agent.modules = env.tier.folder / "records"
    with pytest.raises(AgentError, match="must be apart"):
        play(env, agent)
    agent.close()
    env.close()


def test_it_is_stopped_while_the_environment_acts(env, tmp_path, monkeypatch):
    """Also what it started: it can neither watch nor disturb what is timed."""
    source = """
import subprocess, sys, time
class Agent:
    burn = None
    def __init__(self, tier): pass
    def act(self, observation, info):
        code = "with open('/agent/n', 'a', 1) as f:\\n  while True: f.write('x\\\\n')"
        self.burn = self.burn or subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        time.sleep(2)
        return {"type": "note", "text": ""}
"""
    agent = isolated(env, tmp_path, monkeypatch, source)
    observation, info = env.reset()
    agent.act(observation, info)
    count = env.episode.folder / "agent" / "n"
    before = count.stat().st_size
    time.sleep(0.5)
    assert count.stat().st_size == before > 0
    agent.act(observation, info)
    assert count.stat().st_size > before
    agent.close()


def test_one_untrusted_process_is_enough(env, tmp_path):
    """An episode that went on outside of the sandbox once is not trusted again."""
    env.reset()
    env.leave()
    folder = env.episode.folder
    for trusted in (False, True):
        again = Speedrun("nano-steps", backend=FakeBackend(landscape), agent_trusted=trusted)
        again.resume(folder)
        assert again.episode.agent_trusted is False
        again.leave()


def test_what_steers_a_terminal_is_escaped(capsys):
    from nanogpt_env.display import say

    say("\x1b]0;title\x07\x9b2J\u202eabc\n\ud800")
    out = capsys.readouterr().out
    assert out == "\\x1b]0;title\\x07\\x9b2J\\u202eabc\n\\ud800\n"


def test_its_folder_is_no_way_out(env, tmp_path):
    """Links and pipes that it laid where the notes of a language model will be."""
    from nanogpt_env.agents.language import _read
    from nanogpt_env.ledger import write_whole

    secret, folder = tmp_path / "secret", tmp_path / "agent"
    secret.write_text("secret")
    folder.mkdir()
    for name in ("plan.md", "goal.md"):
        (folder / name).symlink_to(secret)
    os.mkfifo(folder / "spent.json")
    assert [_read(folder / name) for name in ("plan.md", "spent.json", "none")] == ["", "", ""]
    write_whole(folder / "goal.md", "goal")
    assert secret.read_text() == "secret" and not (folder / "goal.md").is_symlink()


def test_what_it_prints_is_bounded(env, tmp_path, monkeypatch):
    look = """
    def look(self, info):
        import os, sys
        try: os.ftruncate(1, 1 << 43)
        except OSError: pass
        for _ in range(64): os.write(1, b"x" * (1 << 20))
        os.write(1, b"\\nlast words\\n"); os._exit(7)
"""
    agent = isolated(env, tmp_path, monkeypatch, ONE + look)
    with pytest.raises(AgentError, match="exit status 7: last words"):
        play(env, agent)
    agent.close()


def test_the_public_tier(env):
    tier = public(env.tier)
    assert tier.span() == env.tier.span()
    assert {n: bool(r.sources) for n, r in tier.records.items()} == {"adamw": True, "normuon": False}


# --- the socket ---


@pytest.fixture
def talking(env, tmp_path):
    """(RemoteAgent, what speaks to it)."""
    path = tmp_path / "s"
    agent = RemoteAgent(env.tier, path)

    def speak(*data):
        def run():
            with socket.socket(socket.AF_UNIX) as s:
                s.connect(str(path))
                for part in data:
                    with contextlib.suppress(BrokenPipeError):
                        s.sendall(part)
                time.sleep(0.5)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return agent

    yield speak
    agent.close()


def test_what_it_says_is_parsed_as_any_action(env, talking):
    lines = [b"\xff\xfe\n", b"[]\n", b'{"type": "stop", "reward": 1}\n', b'{"observation": 1}\n', b"\n", b'{"type":']
    agent = talking(*lines, b' "stop"}\n')
    played = play(env, agent)
    assert [s["type"] for s in played.steps] == ["malformed"] * 5 + ["stop"]
    assert played.total_reward == 0


def test_an_endless_line_ends_it(env, talking):
    agent = talking(*[b"x" * (1 << 20)] * (MAX_LINE // (1 << 20) + 1))
    with pytest.raises(AgentError, match="a line of more than"):
        play(env, agent)


def test_one_that_hangs_up(env, talking):
    agent = talking(b'{"type": "note", "text": "x"}\n')
    with pytest.raises(AgentError, match="is gone"):
        play(env, agent)


def test_silence_ends_with_the_episodes_wall_time(talking):
    agent = talking(b"")
    with pytest.raises(AgentError, match="silent until"):
        agent.act({"text": ""}, {"budget": {"wall_seconds": {"left": 0.2}}})


def test_a_socket_that_cannot_be_made(env, tmp_path):
    with pytest.raises(AgentError, match="cannot make the socket"):
        RemoteAgent(env.tier, tmp_path / "no" / "s")


# --- from the command line ---


def test_a_language_model_in_isolation(tmp_path, monkeypatch):
    """The example agent, with the network, by real training on the tier of the tests."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    notes = ("write_notes", {"file": "plan.md", "text": "a plan"})
    with serving(Says(calls=[notes, ("run", {"horizon": 40})]), Says(calls=[("stop", {})])) as server:
        options = ["--set", "model=m", "--set", f"base_url={server.url}/v1", "--output", tmp_path]
        done = call(
            "play", "--tier", TINY, "--agent", "openai_agent:OpenAIAgent", "--isolate", "--network", *options,
            cwd=EXAMPLES,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "val_loss" in json.dumps(server.requests[1]["messages"])
    (ledger,) = tmp_path.glob("*/ledger.jsonl")
    assert read_ledger(ledger)[0][0]["agent_trusted"] is True
    assert (ledger.parent / "agent" / "plan.md").read_text() == "a plan"


def test_an_agent_that_comes_by_itself(tmp_path):
    path = tmp_path / "s"
    command = [Path(sys.executable).with_name("nanogpt-env"), "play", "--tier", TINY, "--listen", path]
    with (tmp_path / "log").open("wb") as log:
        waiting = subprocess.Popen([*command, "--output", tmp_path / "out"], stderr=log)
    while not path.exists():
        time.sleep(0.1)
    (tmp_path / "own.py").write_text(
        "class A:\n    def __init__(s, t): pass\n    def act(s, o, i): return {'type': 'stop'}\n"
    )
    module = [sys.executable, "-m", "nanogpt_env.agents.remote", str(path), "own:A"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{EXAMPLES.parent}"}
    done = subprocess.run(module, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert waiting.wait(60) == 0
    assert "waiting for an agent" in (tmp_path / "log").read_text()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["recovered"] == 0
    assert not path.exists() and not descendants(waiting.pid)


@pytest.mark.parametrize("more", [["--network"], ["--isolate", "--listen", "x"]])
def test_options_that_contradict_each_other(more, tmp_path):
    done = call("play", "--agent", "greedy", *more, cwd=tmp_path)
    assert done.returncode == 2 and "--isolate" in done.stderr


def test_code_under_this_user_is_not_trusted(env, tmp_path):
    env.agent_trusted = False
    observation, _ = env.reset()
    assert observation
    assert read_ledger(env.episode.ledger.path)[0][0]["agent_trusted"] is False
    from test_wrappers import BETTER

    from nanogpt_env.wrappers import SettingsWrapper

    wrapped = SettingsWrapper(env)
    wrapped.reset()
    *_, info = wrapped.step(BETTER)
    assert info["verdict"]["accepted"] and info["verdict"]["trusted"] is False

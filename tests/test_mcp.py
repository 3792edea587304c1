"""The MCP server, by the official client library: over standard input and output, over HTTP, killed and reconnected."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import TINY
from episodes import FAST, SLOW
from fakes import FakeBackend, hidden_losses
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import create_mcp_http_client, streamable_http_client
from processes import left_after, of_this_process
from test_cli import COMMAND, call, refused

from nanogpt_env import Speedrun
from nanogpt_env.errors import ActionError
from nanogpt_env.ledger import read_ledger
from nanogpt_env.replay import replay
from nanogpt_env.serving import http as web
from nanogpt_env.serving.mcp import serve
from nanogpt_env.serving.room import Room
from nanogpt_env.tiers import load_tier

TOOLS = {
    "task", "read_file", "write_file", "edit_file", "apply_patch", "revert", "notes", "run", "result", "cancel",
    "submit", "status", "records", "stop",
}  # fmt: skip


@pytest.fixture
def rooms(tmp_path):
    opened = []

    def make(backend=None, name="one", **options):
        backend = backend or FakeBackend()
        opened.append(
            Room.open(lambda folder: Speedrun(TINY, backend=backend, state_dir=folder, **options), tmp_path / name)
        )
        return opened[-1]

    yield make
    for room in opened:
        room.close()


def talk(work, server, **options):
    """Run `work(client)`."""

    async def main():
        async with Client(server, **options) as client:
            return await work(client)

    return asyncio.run(asyncio.wait_for(main(), 120))


async def use(client, tool, **arguments):
    """A tool's text; `!` before that of an error."""
    result = await client.call_tool(tool, arguments)
    text = "\n".join(part.text for part in result.content)
    return f"!{text}" if result.is_error else text


async def play(client):
    """Better than the start record, to the end: what each tool said."""
    said = [await use(client, "write_file", path="optimizer.py", text=FAST)]
    said.append(await use(client, "run", horizon=60))
    said.append(await use(client, "submit", claim=60, horizon=60))
    said.append(await use(client, "stop"))
    return said


# --- an episode ---


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_a_whole_episode(rooms, mode):
    room = rooms()
    wrote, ran, submitted, stopped = talk(play, serve(room), mode=mode)
    assert wrote.startswith("wrote optimizer.py") and "val_loss" in ran
    assert "accepted" in submitted and "reward +" in submitted and "recovered" in stopped
    assert room.over == "stopped by the agent"
    assert replay(room.env.episode.ledger.path).total_reward > 0


def test_the_tools_and_resources(rooms):
    room = rooms()

    async def look(client):
        tools = (await client.list_tools()).tools
        resources = {str(r.uri) for r in (await client.list_resources()).resources}
        templates = {t.uri_template for t in (await client.list_resource_templates()).resource_templates}
        await use(client, "run", horizon=60)
        names = [*resources, "speedrun://logs/run-1"]
        read = {name: (await client.read_resource(name)).contents[0].text for name in names}
        return tools, resources, templates, read

    tools, resources, templates, read = talk(look, serve(room))
    assert {tool.name for tool in tools} == TOOLS
    assert all(tool.description and tool.input_schema["additionalProperties"] is False for tool in tools)
    waits = next(tool for tool in tools if tool.name == "run").input_schema["properties"]["wait_seconds"]
    assert (waits["minimum"], waits["maximum"]) == (0, 600)
    assert resources == {f"speedrun://{name}" for name in ("task", "rules", "status", "ledger")}
    assert templates == {"speedrun://logs/{handle}"}
    assert read["speedrun://task"] == room.env.tier.task
    assert "denied_imports" in read["speedrun://rules"]
    assert json.loads(read["speedrun://status"])["budget"]["runs"]["spent"] == 1


def test_the_ledger_of_an_agent_tells_nothing_of_the_hidden_shard(rooms):
    room = rooms(FakeBackend(hidden_losses([4.49871, 4.50123, 4.49934, 4.50251, 4.49811, 4.50017])))

    async def look(client):
        await use(client, "submit", claim=60, horizon=60)
        return (await client.read_resource("speedrun://ledger")).contents[0].text

    text = talk(look, serve(room))
    assert {line["kind"] for line in json.loads(text)} >= {"episode", "submit", "verdict", "reward"}
    lines, _ = read_ledger(room.env.episode.ledger.path)
    hidden = [line["loss"] for line in lines if line["kind"] == "rerun"]
    assert hidden and not any(str(loss) in text for loss in hidden)


def test_refusals_are_errors_that_say_why(rooms):
    async def try_all(client):
        tries = {
            "no file": ("read_file", {"path": "../x"}),
            "no place": ("write_file", {"path": "train.py", "text": "x"}),
            "no run": ("result", {"handle": "run-9"}),
            "nothing to cancel": ("cancel", {"handle": "run-9"}),
            "nothing submitted": ("result", {}),
            "no program": ("write_file", {"path": "optimizer.py", "text": "import os\n"}),
            "judged": ("run", {}),
            "a patch": ("apply_patch", {"patch": "hello"}),
            "too long a wait": ("run", {"wait_seconds": 10**6}),
            "no such tool": ("dance", {}),
            "wrong kind": ("run", {"horizon": "soon"}),
            "wrong name": ("submit", {"steps": 60, "horizon": 60}),
        }
        said = {}
        for name, (tool, arguments) in tries.items():
            try:
                said[name] = await use(client, tool, **arguments)
            except Exception as error:
                said[name] = f"!{error}"
        return said

    said = talk(try_all, serve(rooms()))
    assert said.pop("no program").startswith("wrote")
    assert all(text.startswith("!") for text in said.values()), said
    assert "run-9" in said["no run"] and "may not import os" in said["judged"]
    assert "nothing was submitted" in said["nothing submitted"]


def test_notes_are_kept(rooms):
    async def note(client):
        await use(client, "notes", text="higher rates help")
        return await use(client, "notes", text="but not above 0.1"), await use(client, "notes")

    first, second = talk(note, serve(rooms()))
    assert first == second and "higher rates help\nbut not above 0.1" in first


def test_a_run_that_takes_long_is_waited_for_with_progress(rooms):
    room = rooms(backend := FakeBackend(hold={1}))
    heard = []

    async def progress(done, total, message):
        heard.append((done, message))

    async def go(client):
        answer = await client.call_tool("run", {"horizon": 60, "wait_seconds": 1.2}, progress_callback=progress)
        going = answer.content[0].text
        status = json.loads(await use(client, "status"))
        cancelled = await use(client, "cancel", handle="run-1")
        return going, status, cancelled

    going, status, cancelled = talk(go, serve(room))
    assert "run-1 goes on" in going and status["running"] == ["run-1"]
    assert "cancelled" in cancelled
    assert len(heard) >= 2 and "run-1: 1 of 60" in heard[0][1]
    assert [d for d, _ in heard] == sorted(d for d, _ in heard)
    assert not backend.jobs or room.env.episode.budget.spent("runs") == 1


class Slow(FakeBackend):
    """Verification waits for `gate`."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()

    def start(self, job, share=False):
        run = super().start(job, share)
        if not share:
            run.result = lambda timeout=None: self.gated(run, timeout)
        return run

    def gated(self, run, timeout):
        if not run.cancelled and not self.gate.wait(timeout):
            raise TimeoutError
        return type(run).result(run)


def test_a_submission_goes_on_while_nobody_is_connected(rooms):
    room = rooms(backend := Slow())
    server = serve(room)

    async def submit(client):
        await use(client, "write_file", path="optimizer.py", text=FAST)
        return [
            await use(client, "submit", claim=60, horizon=60, wait_seconds=0.3),
            await use(client, "write_file", path="optimizer.py", text=SLOW),
            await use(client, "submit", claim=50, horizon=60),
            json.loads(await use(client, "status"))["being_verified"],
        ]

    first, refused_edit, refused_submit, verified = talk(submit, server)
    assert "being verified" in first and verified == "rerun 1"
    assert "!" in refused_edit and "a submission is being verified (rerun 1)" in refused_edit
    assert "!" in refused_submit and "a submission is being verified" in refused_submit
    backend.gate.set()
    again = talk(lambda client: use(client, "result"), server)
    assert "accepted" in again
    assert talk(lambda client: use(client, "result"), server) == again


def test_closing_leaves_the_episode_to_go_on_with(rooms, tmp_path):
    room = rooms(Slow())

    async def submit(client):
        await use(client, "write_file", path="optimizer.py", text=FAST)
        await use(client, "notes", text="remember me")
        return await use(client, "submit", claim=60, horizon=60, wait_seconds=0.5)

    talk(submit, serve(room))
    room.close()
    again = rooms()

    async def go_on(client):
        read = [await use(client, "read_file", path="optimizer.py"), await use(client, "notes")]
        return *read, await use(client, "status"), await use(client, "submit", claim=60, horizon=60)

    text, notes, status, submitted = talk(go_on, serve(again))
    assert FAST in text and "remember me" in notes and "accepted" in submitted
    assert json.loads(status)["budget"]["submissions"]["spent"] == 1, "or leaving were a free look at reruns"
    assert again.env.episode.id == room.env.episode.id
    assert replay(again.env.episode.ledger.path).differences == []


def test_one_at_a_time_and_none_after_the_end(rooms):
    room = rooms()
    with pytest.raises(ActionError, match="another server"):
        rooms()
    talk(lambda client: use(client, "stop"), serve(room))
    assert talk(lambda client: use(client, "read_file"), serve(room)).count("the episode is over")
    room.close()
    with pytest.raises(ActionError, match="has ended"):
        rooms()


# --- over HTTP ---


@contextlib.contextmanager
def serving(rooms, names=("a", "b"), tokens=True, **backends):
    import uvicorn

    doors = {n: web.Door(serve(rooms(backends.get(n), name=n)), f"token-{n}" if tokens else None) for n in names}
    at = web.listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(web.application(doors, "127.0.0.1"), log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [at]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{at.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        at.close()


@contextlib.asynccontextmanager
async def client_of(url, name, token=None):
    headers = {"Authorization": f"Bearer {token or 'token-' + name}"}
    async with (
        create_mcp_http_client(headers=headers) as http,
        streamable_http_client(f"{url}/{name}/mcp", http_client=http) as streams,
    ):
        yield streams


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_two_episodes_at_once_on_one_server(rooms, mode):
    async def both(url):
        async def one(name):
            async with Client(client_of(url, name), mode=mode) as client:
                return await play(client)

        return await asyncio.gather(one("a"), one("b"))

    with serving(rooms) as url:
        for said in asyncio.run(asyncio.wait_for(both(url), 120)):
            assert "accepted" in said[2]


def test_episodes_are_isolated(rooms):
    with serving(rooms) as url:
        talk(lambda c: use(c, "notes", text="a's secret"), client_of(url, "a"))
        assert "secret" not in talk(lambda c: use(c, "notes"), client_of(url, "b"))
        with pytest.raises(BaseException):  # noqa: B017, PT011  the client's library wraps it in groups
            talk(lambda c: use(c, "notes"), client_of(url, "a", "token-b"))
        assert "secret" in talk(lambda c: use(c, "notes"), client_of(url, "a"))


def post(url, body=b"{}", **headers):
    request = urllib.request.Request(url, data=body, headers={"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_without_its_token_nobody_comes_in(rooms):
    with serving(rooms) as url:
        good = {"Authorization": "Bearer token-a"}
        for headers in (
            {},
            {"Authorization": "Bearer token-b"},
            {"Authorization": "token-a"},
            {"Authorization": "Bearer "},
        ):
            assert post(f"{url}/a/mcp", **headers) == 401
        assert post(f"{url}/a/mcp", **good) in (400, 406)
        assert post(f"{url}/c/mcp", **good) == 404
    with serving(rooms, names=("d",), tokens=False) as url:
        assert post(f"{url}/d/mcp") in (400, 406)
        assert post(f"{url}/d/mcp", Host="evil.example") == 421


def test_requests_are_bounded_in_size_and_time(rooms, monkeypatch):
    monkeypatch.setattr(web, "BODY_S", 0.5)
    monkeypatch.setattr(web, "MAX_BODY", 1 << 14)  # a larger one would be refused, and cut, while it is being sent
    with serving(rooms) as url:
        good = {"Authorization": "Bearer token-a", "Accept": "application/json, text/event-stream"}
        assert post(f"{url}/a/mcp", b"x" * (1 << 15), **good) == 413
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            good |= {"Host": f"{host}:{port}", "Content-Type": "application/json", "Content-Length": "99"}
            head = "POST /a/mcp HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in good.items())
            slow.sendall(f"{head}\r\n{{".encode())
            began = time.monotonic()
            while slow.recv(4096):
                pass
            assert time.monotonic() - began < 8
        assert "recovered" in talk(lambda c: use(c, "status"), client_of(url, "a"))


def test_a_client_that_was_killed_comes_back(rooms):
    """In the middle of a verification."""
    backend = Slow()
    script = f"""
import asyncio, sys
from mcp import Client
from mcp.client.streamable_http import create_mcp_http_client, streamable_http_client
async def main():
    http = create_mcp_http_client(headers={{"Authorization": "Bearer token-a"}})
    async with Client(streamable_http_client(sys.argv[1], http_client=http)) as client:
        await client.call_tool("write_file", {{"path": "optimizer.py", "text": {FAST!r}}})
        print("here", flush=True)
        await client.call_tool("submit", {{"claim": 60, "horizon": 60}})
asyncio.run(main())
"""
    with serving(rooms, a=backend) as url:
        with subprocess.Popen(
            [sys.executable, "-c", script, f"{url}/a/mcp"], stdout=subprocess.PIPE, text=True
        ) as client:
            assert client.stdout.readline() == "here\n"
            while '"being_verified": "rerun' not in talk(lambda c: use(c, "status"), client_of(url, "a")):
                time.sleep(0.1)
            client.kill()
        backend.gate.set()
        assert "accepted" in talk(lambda c: use(c, "result"), client_of(url, "a"))


# --- the command ---


def stdio(tmp_path, *arguments):
    arguments = ["mcp", "--tier", str(TINY), "--output", str(tmp_path / "episodes"), *map(str, arguments)]
    return StdioServerParameters(command=str(COMMAND), args=arguments, env=dict(os.environ))


def test_an_episode_to_a_verified_reward(tmp_path):
    """By real training, over standard input and output."""
    tier = load_tier(TINY)
    record = tier.record("fast")
    claim = tier.measured.records["fast"].claim or record.horizon

    async def work(client):
        await use(client, "write_file", path="optimizer.py", text=record.sources["optimizer.py"])
        ran = await use(client, "run", horizon=record.horizon, wait_seconds=600)
        submitted = await use(client, "submit", claim=claim, horizon=record.horizon, wait_seconds=1)
        while "being verified" in submitted:
            submitted = await use(client, "result", wait_seconds=20)
        return ran, submitted, await use(client, "stop")

    async def main():
        async with Client(stdio(tmp_path)) as client:
            return await work(client)

    ran, submitted, stopped = asyncio.run(asyncio.wait_for(main(), 900))
    assert "val_loss" in ran and "accepted" in submitted and "trusted: false" in submitted
    (ledger,) = (tmp_path / "episodes" / "default").glob("*/ledger.jsonl")
    found = replay(ledger)
    assert found.differences == [] and found.total_reward > 0.2
    assert "recovered" in stopped


def test_a_server_that_was_killed_goes_on(tmp_path):
    async def first(client):
        await use(client, "notes", text="still here")
        await use(client, "run", horizon=20, wait_seconds=0)
        for pid, _ in of_this_process():
            with contextlib.suppress(OSError):
                if "mcp" in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)
        await use(client, "status")

    before = of_this_process()
    with pytest.raises(ExceptionGroup):  # as the client's library says that the connection is gone
        talk(first, stdio(tmp_path))
    assert "still here" in talk(lambda client: use(client, "notes"), stdio(tmp_path))
    assert left_after(of_this_process() - before, 10) == []


def test_the_command_over_http(tmp_path):
    command = [
        COMMAND,
        "mcp",
        "--tier",
        str(TINY),
        "--output",
        str(tmp_path),
        "--http",
        "127.0.0.1:0",
        "--episodes",
        "x,y",
    ]
    tokens = []
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}  # who reads a pipe must see it
    for _ in range(2):  # the second time it goes on, with the same tokens
        with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True, env=environment) as server:
            text = ""
            while not text.endswith("]\n"):
                text += server.stdout.readline()
            doors = json.loads(text)
            tokens.append([door["token"] for door in doors])
            url = doors[0]["url"].removesuffix("/x/mcp")
            assert "task.md" in talk(lambda c: use(c, "read_file"), client_of(url, "x", doors[0]["token"]))
            server.send_signal(signal.SIGINT)
            assert server.wait(30) in (0, 130)
    assert tokens[0] == tokens[1] and len(set(tokens[0])) == 2
    assert (tmp_path / "x" / "token").stat().st_mode & 0o077 == 0


def test_bad_arguments(tmp_path):
    for arguments, message in (
        (("--http", "nowhere"), "HOST:PORT"),
        (("--http", "0.0.0.0:0", "--no-token"), "loopback"),
        (("--http", "192.0.2.1:1"), "cannot listen"),
        (("--episodes", "a,b"), "--http"),
        (("--http", "127.0.0.1:0", "--episodes", "a/b"), "names of episodes"),
        (("--http", "127.0.0.1:0", "--episodes", "a,a"), "names of episodes"),
    ):
        refused(call("mcp", "--tier", TINY, "--output", tmp_path, *arguments), message)

"""An agent in a sandbox of its own (gpu_backend/agent_host.py), at a socket: it sees the interpreter with its packages,
this package's code and the folder of its own module, and writes to one folder. docs/agents.md says what was tried.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from nanogpt_env.agents.remote import ARRIVAL_S, RemoteAgent
from nanogpt_env.content import cache_dir, content_root, state_dir
from nanogpt_env.errors import ActionError, AgentError
from nanogpt_env.tracks import Tier

NOTES = "/agent"
"""where the folder lies in there that it may write to: `agent` beside the ledger"""
KEPT_OUTPUT = 4096
"""bytes of what it prints, the last ones"""
FREEZE_S = 2.0
_KEYS = ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL")


class IsolatedAgent:
    """The agent `name`, started when it is first to act; `close` kills it and all that it started. While the
    environment acts it is stopped, so that it neither burns what is measured nor watches. network: whether it has the
    host's, and the keys of providers. Raises `AgentError` where there is no bubblewrap, or where the folder of the
    agent's module has to do with what it may not see; as `RemoteAgent` when it is gone."""

    def __init__(self, tier: Tier, name: str, options: Mapping[str, Any], network: bool) -> None:
        self.tier, self.name, self.options, self.network = tier, name, options, network
        self.modules = _modules(name)
        self._stack = contextlib.ExitStack()
        self._remote: RemoteAgent | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._output = b""

    def act(self, observation: dict[str, Any], info: dict[str, Any]) -> str:
        if self._remote is None:
            self._remote = self._start(Path(info["ledger"]).parent)
        self._signal(signal.SIGCONT)
        action = self._remote.act(observation, info)
        self._stop()
        return action

    def close(self) -> None:
        self._stack.close()

    def _start(self, episode: Path) -> RemoteAgent:
        hidden = [content_root() / name for name in ("envs", "gpu_backend", "judges")]
        hidden += [self.tier.folder, *self.tier.bases, self.tier.corpus_folder(), episode, state_dir(), cache_dir()]
        hidden = [path.resolve() for path in hidden]
        for path in hidden if self.modules else ():
            assert self.modules
            if path.is_relative_to(self.modules) or self.modules.is_relative_to(path):
                raise AgentError(
                    f"an isolated agent sees the folder of its module, {self.modules}, which must be apart from "
                    f"{path}: move it, or what the environment writes (--output)"
                )
        notes = episode / "agent"
        notes.mkdir(exist_ok=True)
        temporary = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="nanogpt-agent-")))
        remote = RemoteAgent(self.tier, temporary / "environment", self._ended, ARRIVAL_S)
        self._stack.callback(remote.close)
        package = Path(__file__).resolve().parents[1]
        paths = [*([self.modules] if self.modules else []), package.parent]
        variables = {"PATH": os.defpath, "HOME": NOTES, "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        variables |= {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        variables |= {key: os.environ[key] for key in _KEYS if self.network and key in os.environ}
        command = [sys.executable, "-m", "nanogpt_env.agents.remote", "/environment", self.name]
        specification = {
            "command": [*command, json.dumps(dict(self.options))],
            "variables": variables,
            "show": [str(package), *([str(self.modules)] if self.modules else [])],
            "hide": [str(path) for path in hidden],
            "bind": {str(notes): NOTES, str(temporary / "environment"): "/environment"},
            "network": self.network,
            "folder": NOTES,
        }
        host = content_root() / "gpu_backend" / "agent_host.py"
        self._process = process = subprocess.Popen(
            [sys.executable, "-B", str(host), json.dumps(specification)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        self._stack.callback(reader.join, FREEZE_S)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)  # and with it all in its namespace
        return remote

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        with process.stdout as stream:
            while data := os.read(stream.fileno(), 1 << 16):
                self._output = (self._output + data)[-KEPT_OUTPUT:]

    def _ended(self) -> str:
        if self._process is None or self._process.poll() is None:
            return ""
        last = self._output.decode("utf-8", "replace").strip().splitlines()[-1:]
        return f"exit status {self._process.returncode}: {(last or ['no output'])[0][:500]}"

    # --- stopping all of its processes: nobody may signal a namespace ---

    def _stop(self) -> None:
        """Stop every process of it. Raises `AgentError` if new ones come as fast as they are stopped."""
        began = time.monotonic()
        while self._signal(signal.SIGSTOP):
            if time.monotonic() - began > FREEZE_S:
                raise AgentError("the agent's processes cannot be stopped while the environment acts")

    def _signal(self, number: signal.Signals) -> int:
        """To every process of it that is in another state: how many there were."""
        sent = 0
        for pid in self._processes():
            with contextlib.suppress(OSError, IndexError):
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                if (state == "T") != (number == signal.SIGSTOP) and state not in "ZX":
                    os.kill(pid, number)
                    sent += 1
        return sent

    def _processes(self) -> Iterator[int]:
        """In its namespace of processes, found by the one below bubblewrap's own."""
        assert self._process
        own = _namespace(os.getpid())
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
            inside = {_namespace(int(pid)) for pid in children} - {own, ""}
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit() and _namespace(int(entry.name)) in inside:
                    yield int(entry.name)


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def _modules(name: str) -> Path | None:
    """The folder that the agent's module is imported from, which is not done here; None for one of ours."""
    if ":" not in name:
        return None
    top = name.partition(":")[0].partition(".")[0]
    spec = PathFinder.find_spec(top, [os.getcwd(), *sys.path]) if top.isidentifier() else None
    if spec is None or spec.origin is None:
        raise ActionError(f"agent {name!r} cannot be imported: there is no module {top!r}")
    origin = Path(spec.origin).resolve()
    return origin.parents[1] if spec.submodule_search_locations else origin.parent

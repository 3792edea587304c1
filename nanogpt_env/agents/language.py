"""An agent that is a language model with tools. What speaks to a provider is a subclass: examples/.

All that it must not forget lies in files: `goal.md`, which is generated, and `plan.md` and `scratchpad/THREAD.md`,
which are the model's. When its context is full, or after a crash, a conversation begins anew with these.
"""

from __future__ import annotations

import abc
import json
import os
import stat
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanogpt_env.actions import Action, Stop, tool_schemas
from nanogpt_env.errors import AgentError
from nanogpt_env.ledger import write_whole
from nanogpt_env.tracks import Tier

REPLY_TOKENS = 8192
"""of one reply, at most"""
RESULT_CHARACTERS = 20_000
"""of one observation that the model is shown"""
CHARACTERS_PER_TOKEN = 3
"""cautiously few"""
MAX_NOTE = 200_000
"""characters of a note that are read"""
RETRIES = 6
"""after connections that broke during a reply; the SDKs themselves retry what is refused"""
NUDGES = 3
"""in a row, to a model that calls no tool"""

SYSTEM = """You are a researcher who makes the training of a small language model faster. You work by calling tools;
every reply must call at least one. Only what `submit` gets verified counts. Your context is cut from time to time:
what you want to keep belongs into plan.md (what you are going to do and why) and scratchpad/THREAD.md (what you have
tried and learned), which you write with `write_notes` and are shown again. goal.md is written for you."""

PLAN, THREAD = "plan.md", "scratchpad/THREAD.md"
WRITE_NOTES = "write_notes"
NOTES_TOOL = (
    "Replace one of your notes. They outlive your context.",
    {
        "type": "object",
        "properties": {"file": {"type": "string", "enum": [PLAN, THREAD]}, "text": {"type": "string"}},
        "required": ["file", "text"],
    },
)
CUT = "Your context is about to be cut to your notes. Bring plan.md and scratchpad/THREAD.md up to date now."

Tools = dict[str, tuple[str, dict[str, Any]]]
"""by name: what it does, JSON schema of its arguments"""


@dataclass(frozen=True)
class Call:
    """Of a tool. `arguments`: JSON text, as it came."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """From the `user`, with the results of the calls before as (id of the call, text), or from the `assistant`."""

    role: str
    text: str = ""
    calls: tuple[Call, ...] = ()
    results: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Reply:
    message: Message
    input_tokens: int
    output_tokens: int


@dataclass
class Spent:
    """What an episode's model has cost so far, over all processes."""

    replies: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    dollars: float = 0.0


@dataclass
class Talk:
    """Where the conversation stands."""

    messages: list[Message] = field(default_factory=list)
    waiting: list[Call] = field(default_factory=list)
    """calls of the last reply that are still to be done"""
    results: list[tuple[str, str]] = field(default_factory=list)
    """of those that are done"""
    asked: Call | None = None
    """the one that the environment is doing"""


class LanguageAgent(abc.ABC):
    """model: its name at the provider. tokens, dollars: limits of an episode, input and output together; dollars need
    the `input_price` and `output_price` of a million tokens. context: tokens after which a conversation begins anew.
    notes: their folder, by default `agent` beside the ledger, or the working directory where that is not seen."""

    def __init__(
        self,
        tier: Tier,
        *,
        model: str,
        tokens: int = 1_000_000,
        dollars: float | None = None,
        input_price: float | None = None,
        output_price: float | None = None,
        context: int = 100_000,
        notes: str | None = None,
    ) -> None:
        if dollars is not None and (input_price is None or output_price is None):
            raise AgentError("a limit in dollars needs input_price and output_price, in dollars per million tokens")
        self.tier, self.model, self.tokens, self.dollars, self.context = tier, model, tokens, dollars, context
        self.prices = (input_price or 0.0, output_price or 0.0)
        self.notes = Path(notes) if notes else None
        self.spent, self.talk = Spent(), Talk()
        self.task = ""
        self._last = 0
        self._nudges = 0

    @abc.abstractmethod
    def ask(self, messages: Sequence[Message], tools: Tools, max_tokens: int) -> Reply:
        """One reply of the model to the conversation, whose system prompt is `SYSTEM`."""

    def act(self, observation: dict[str, Any], info: dict[str, Any]) -> Action | dict[str, Any]:
        """Raises `AgentError` when the model cannot be reached; `nanogpt-env play --resume` goes on."""
        self._see(observation["text"], info)
        while True:
            while self.talk.waiting:
                call = self.talk.waiting.pop(0)
                action = self._action(call)
                if action is not None:
                    self.talk.asked = call
                    return action
            if not self._next_reply():
                return Stop()

    # --- what happens between two actions ---

    def _see(self, text: str, info: dict[str, Any]) -> None:
        if self.notes is None:
            folder = Path(info["ledger"]).parent
            self.notes = folder / "agent" if os.access(folder, os.W_OK) else Path.cwd()  # where it is isolated
        if not self.task:
            self.task = text
            self._load()
        self._write("goal.md", goal(self.tier, info))
        if self.talk.asked:
            cut = "" if len(text) <= RESULT_CHARACTERS else f"\n[{len(text) - RESULT_CHARACTERS} characters cut]"
            self.talk.results.append((self.talk.asked.id, text[:RESULT_CHARACTERS] + cut))
            self.talk.asked = None
        elif not self.talk.messages:
            self.talk.messages = [self._opening()]

    def _action(self, call: Call) -> dict[str, Any] | None:
        """What the environment is to do, or None if the call was answered here."""
        try:
            arguments = json.loads(call.arguments or "{}")
            if not isinstance(arguments, dict):
                raise ValueError("they must be one JSON object")
        except (ValueError, RecursionError) as error:
            self.talk.results.append((call.id, f"refused: the arguments cannot be read: {error}"))
            return None
        if call.name != WRITE_NOTES:
            return {**arguments, "type": call.name}
        self.talk.results.append((call.id, self._write_notes(arguments)))
        return None

    def _next_reply(self) -> bool:
        """Ask the model for more calls. False if it is to stop."""
        messages = self.talk.messages
        if self.talk.results:
            messages.append(Message("user", results=tuple(self.talk.results)))
            self.talk.results = []
        elif messages[-1].role == "assistant":
            self._nudges += 1
            if self._nudges > NUDGES:
                return False
            messages.append(Message("user", "Call a tool; `stop` ends the episode."))
        if self._last > self.context:
            self._begin_anew()
        reply = self._reply({**tool_schemas(), WRITE_NOTES: NOTES_TOOL})
        if reply is None:
            return False
        if reply.calls:
            self._nudges = 0
        self.talk.waiting = list(reply.calls)
        return True

    def _begin_anew(self) -> None:
        """Let the model write its notes, then forget all else."""
        last = self.talk.messages[-1]
        self.talk.messages[-1] = Message("user", f"{last.text}\n{CUT}".strip(), results=last.results)
        if reply := self._reply({WRITE_NOTES: NOTES_TOOL}):
            for call in reply.calls:
                if call.name == WRITE_NOTES:
                    self._action(call)
        self.talk, self._last = Talk([self._opening()]), 0

    def _opening(self) -> Message:
        assert self.notes is not None
        parts = [self.task]
        for name in ("goal.md", PLAN, THREAD):
            path = self.notes / name
            parts.append(f"# {name}\n{_read(path) or '(nothing yet)'}")
        return Message("user", "\n\n".join(parts))

    # --- the model ---

    def _reply(self, tools: Tools) -> Message | None:
        """The model's next message, which joins the conversation; None if a limit does not allow it."""
        new = self.talk.messages[-1]
        coming = self._last + (len(new.text) + sum(len(t) for _, t in new.results)) // CHARACTERS_PER_TOKEN
        room = self.tokens - self.spent.input_tokens - self.spent.output_tokens - coming
        if self.dollars is not None and self.prices[1]:
            left = self.dollars - self.spent.dollars - coming * self.prices[0] / 1e6
            room = min(room, int(left / self.prices[1] * 1e6))
        if room < 256:
            _say(f"the agent's limit is reached: {self.spent}")
            return None
        reply = self._asked(tools, min(room, REPLY_TOKENS))
        self._last = reply.input_tokens + reply.output_tokens
        s = self.spent
        self.spent = Spent(
            s.replies + 1,
            s.input_tokens + reply.input_tokens,
            s.output_tokens + reply.output_tokens,
            s.dollars + (reply.input_tokens * self.prices[0] + reply.output_tokens * self.prices[1]) / 1e6,
        )
        self._write("spent.json", json.dumps(vars(self.spent)))
        self.talk.messages.append(reply.message)
        return reply.message

    def _asked(self, tools: Tools, max_tokens: int) -> Reply:
        for attempt in range(RETRIES):
            try:
                return self.ask(self.talk.messages, tools, max_tokens)
            except Exception as error:
                # what has a status was refused, for good or as often as the SDK tried
                if getattr(error, "status_code", 0) >= 400 or attempt == RETRIES - 1:
                    raise AgentError(f"the model cannot be asked: {type(error).__name__}: {error}") from error
                _say(f"the model's reply broke off ({type(error).__name__}); asking again in {2**attempt} s")
                time.sleep(2**attempt)
        raise AssertionError

    # --- notes ---

    def _write_notes(self, arguments: dict[str, Any]) -> str:
        file, text = arguments.get("file"), arguments.get("text")
        if file not in (PLAN, THREAD) or not isinstance(text, str):
            return f"refused: file must be {PLAN} or {THREAD}, and text a text"
        self._write(file, text)
        return f"wrote {file}"

    def _write(self, name: str, text: str) -> None:
        assert self.notes is not None
        path = self.notes / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)

    def _load(self) -> None:
        """Go on with what an earlier process had spent."""
        assert self.notes is not None
        path = self.notes / "spent.json"
        if text := _read(path):
            self.spent = Spent(**json.loads(text))


def goal(tier: Tier, info: dict[str, Any]) -> str:
    """What there is to reach, from the state of the episode."""
    span = tier.span()
    left = ", ".join(f"{meter} {status['left']:.4g}" for meter, status in info["budget"].items())
    return (
        f"Reach a validation loss of {tier.table.training.target:g} in less than the current best: "
        f"{tier.format(info['best'])}, which recovers {info['recovered']:.3f} of the human speedup.\n"
        f"The start record is at {tier.format(span.start_value)}, the best human one at "
        f"{tier.format(span.anchor_value)}. Every new best is to be beaten, too.\nLeft of the budget: {left}.\n"
    )


def _read(path: Path) -> str:
    """A note; "" if there is none. What is no plain file of its own was laid there by an agent in a sandbox."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    with os.fdopen(fd, encoding="utf-8", errors="replace") as file:
        return file.read(MAX_NOTE) if stat.S_ISREG(os.fstat(fd).st_mode) else ""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

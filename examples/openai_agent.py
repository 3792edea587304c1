"""A model of OpenAI, or of any server that speaks chat completions, plays the speedrun, by tools (docs/agents.md).

    pip install 'nanogpt_env[agents]' and set OPENAI_API_KEY
    cd examples && nanogpt-env play --tier nano-steps --agent openai_agent:OpenAIAgent --set model=MODEL \\
        --set dollars=5 --set input_price=3 --set output_price=15       # dollars per million tokens of that model
"""

from collections.abc import Sequence
from typing import Any

import openai

from nanogpt_env.agents.language import SYSTEM, Call, LanguageAgent, Message, Reply, Tools
from nanogpt_env.tracks import Tier


class OpenAIAgent(LanguageAgent):
    """Options as `LanguageAgent`; `base_url` for another server."""

    def __init__(self, tier: Tier, *, base_url: str | None = None, **options: Any) -> None:
        super().__init__(tier, **options)
        self.client = openai.OpenAI(base_url=base_url, max_retries=10)  # waits as retry-after says

    def ask(self, messages: Sequence[Message], tools: Tools, max_tokens: int) -> Reply:
        functions: Any = [
            {"type": "function", "function": {"name": n, "description": text, "parameters": schema}}
            for n, (text, schema) in tools.items()
        ]
        wire: list[Any] = [{"role": "system", "content": SYSTEM}]
        for message in messages:
            wire += self._wire(message)
        with self.client.chat.completions.stream(
            model=self.model,
            messages=wire,
            tools=functions,
            max_completion_tokens=max_tokens,
            stream_options={"include_usage": True},
        ) as stream:
            final = stream.get_final_completion()
        reply, usage = final.choices[0].message, final.usage
        calls = [Call(c.id, c.function.name, c.function.arguments) for c in reply.tool_calls or ()]
        message = Message("assistant", reply.content or "", tuple(calls))
        return Reply(message, usage.prompt_tokens if usage else 0, usage.completion_tokens if usage else 0)

    @staticmethod
    def _wire(message: Message) -> list[Any]:
        wire: list[Any] = [{"role": "tool", "tool_call_id": call, "content": text} for call, text in message.results]
        if message.role == "assistant" and message.calls:
            functions = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in message.calls
            ]
            wire.append({"role": "assistant", "content": message.text or None, "tool_calls": functions})
        elif message.text or not wire:
            wire.append({"role": message.role, "content": message.text or "(no text)"})
        return wire

"""Claude plays the speedrun, by tools (docs/agents.md).

    pip install 'nanogpt_env[agents]' and set ANTHROPIC_API_KEY
    cd examples && nanogpt-env play --tier nano-steps --agent anthropic_agent:AnthropicAgent --set model=MODEL \\
        --set dollars=5 --set input_price=3 --set output_price=15       # dollars per million tokens of that model
"""

import json
from collections.abc import Sequence
from typing import Any

import anthropic

from nanogpt_env.agents.language import SYSTEM, Call, LanguageAgent, Message, Reply, Tools
from nanogpt_env.tracks import Tier


class AnthropicAgent(LanguageAgent):
    """Options as `LanguageAgent`; `base_url` for another server."""

    def __init__(self, tier: Tier, *, base_url: str | None = None, **options: Any) -> None:
        super().__init__(tier, **options)
        self.client = anthropic.Anthropic(base_url=base_url, max_retries=10)  # waits as retry-after says

    def ask(self, messages: Sequence[Message], tools: Tools, max_tokens: int) -> Reply:
        with self.client.messages.stream(
            model=self.model,
            max_tokens=max_tokens,
            system=SYSTEM,
            messages=[self._wire(message) for message in messages],
            tools=[{"name": n, "description": text, "input_schema": schema} for n, (text, schema) in tools.items()],
        ) as stream:
            final = stream.get_final_message()
        calls = [Call(b.id, b.name, json.dumps(b.input)) for b in final.content if b.type == "tool_use"]
        text = "".join(block.text for block in final.content if block.type == "text")
        return Reply(Message("assistant", text, tuple(calls)), final.usage.input_tokens, final.usage.output_tokens)

    @staticmethod
    def _wire(message: Message) -> Any:
        content: list[dict[str, Any]] = [
            {"type": "tool_result", "tool_use_id": call, "content": text} for call, text in message.results
        ]
        if message.text:
            content.append({"type": "text", "text": message.text})
        for call in message.calls:
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)})
        return {"role": message.role, "content": content or "(no text)"}

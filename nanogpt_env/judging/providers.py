"""Models that judge, by their official SDKs, with answers in a structure. `pip install 'nanogpt_env[agents]'`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from nanogpt_env.errors import JudgeUnavailable

RETRIES = 5
"""of refused or broken requests; the SDKs wait as `retry-after` says"""


class FoundBreak(BaseModel):
    """One break of a rule, as a model says it."""

    model_config = ConfigDict(extra="forbid")
    rule: str
    file: str
    line: int
    why: str


class Answer(BaseModel):
    """A model's answer about one part of a program."""

    model_config = ConfigDict(extra="forbid")
    findings: list[FoundBreak]
    verdict: Literal["keeps the rules", "breaks a rule"]


SCHEMA: dict[str, Any] = Answer.model_json_schema()


@dataclass(frozen=True)
class Asked:
    """What one request came to: an answer, or why there is none."""

    answer: Answer | None
    input_tokens: int = 0
    output_tokens: int = 0
    failure: str = ""
    malformed: bool = False
    """it answered, but not in the structure: may be asked again"""


class Provider(Protocol):
    def ask(self, system: str, text: str) -> Asked:
        """Does not raise for what a model or its server does."""

    def close(self) -> None: ...


def find_provider(model: str, timeout_s: float, max_tokens: int, base_url: str | None = None) -> Provider:
    """`anthropic/MODEL` or `openai/MODEL`. Raises `JudgeUnavailable` where the SDK or its key is missing."""
    kind, _, name = model.partition("/")
    kinds: dict[str, Callable[..., Provider]] = {"anthropic": AnthropicProvider, "openai": OpenAIProvider}
    if kind not in kinds or not name:
        raise JudgeUnavailable(f"a judge's model is anthropic/MODEL or openai/MODEL, not {model!r}")
    try:
        return kinds[kind](name, timeout_s, max_tokens, base_url)
    except ImportError as error:
        raise JudgeUnavailable(f"{error}: pip install 'nanogpt_env[agents]'") from None
    except Exception as error:  # the SDKs' own, for a key that is not set
        raise JudgeUnavailable(f"no {kind} client: {error}") from None


class AnthropicProvider:
    def __init__(self, model: str, timeout_s: float, max_tokens: int, base_url: str | None) -> None:
        import anthropic

        self.sdk, self.model, self.max_tokens = anthropic, model, max_tokens
        self.client = anthropic.Anthropic(base_url=base_url, timeout=timeout_s, max_retries=RETRIES)
        if not (self.client.api_key or self.client.auth_token):
            raise JudgeUnavailable("set ANTHROPIC_API_KEY")

    def ask(self, system: str, text: str) -> Asked:
        try:
            message = self.client.messages.create(
                model=self.model,
                max_tokens=self.max_tokens,
                system=system,
                messages=[{"role": "user", "content": text}],
                output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
            )
        except self.sdk.AnthropicError as error:
            return Asked(None, failure=_reason(error))
        used = message.usage.input_tokens, message.usage.output_tokens
        if message.stop_reason == "refusal":
            return Asked(None, *used, "the model refused to answer")
        return _parsed("".join(b.text for b in message.content if b.type == "text"), *used)

    def close(self) -> None:
        self.client.close()


class OpenAIProvider:
    def __init__(self, model: str, timeout_s: float, max_tokens: int, base_url: str | None) -> None:
        import openai

        self.sdk, self.model, self.max_tokens = openai, model, max_tokens
        self.client = openai.OpenAI(base_url=base_url, timeout=timeout_s, max_retries=RETRIES)

    def ask(self, system: str, text: str) -> Asked:
        wanted: Any = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
        try:
            completion = self.client.chat.completions.create(
                model=self.model,
                max_completion_tokens=self.max_tokens,
                messages=[{"role": "system", "content": system}, {"role": "user", "content": text}],
                response_format=wanted,
            )
        except self.sdk.OpenAIError as error:
            return Asked(None, failure=_reason(error))
        usage = completion.usage
        used = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        if not completion.choices:
            return Asked(None, *used, "no answer in the reply", malformed=True)
        message = completion.choices[0].message
        if message.refusal or completion.choices[0].finish_reason == "content_filter":
            return Asked(None, *used, "the model refused to answer")
        return _parsed(message.content or "", *used)

    def close(self) -> None:
        self.client.close()


def _parsed(text: str, input_tokens: int, output_tokens: int) -> Asked:
    try:
        answer = Answer.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]["msg"]
        return Asked(None, input_tokens, output_tokens, f"not the answer's structure: {first}", malformed=True)
    return Asked(answer, input_tokens, output_tokens)


def _reason(error: Exception) -> str:
    status = getattr(error, "status_code", None)
    return f"{type(error).__name__}{f' ({status})' if status else ''}: {str(error)[:200]}"

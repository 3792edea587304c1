"""A local server that speaks the parts of two wire formats that the example agents use: Anthropic's messages and
OpenAI's chat completions, streamed. What it answers is scripted."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Says:
    """A reply: text, calls of tools as (name, arguments), tokens it costs. `cut`: the connection ends half way;
    `overloaded`: an error comes where the rest should; `refusal`: the model will not answer; `seconds`: it takes."""

    text: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    tokens: tuple[int, int] = (100, 10)
    cut: bool = False
    overloaded: bool = False
    refusal: bool = False
    seconds: float = 0.0


@dataclass
class Fails:
    """An HTTP error."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=lambda: {"error": {"type": "some_error", "message": "no"}})


class Cut(Exception):
    pass


def anthropic_events(says: Says) -> Iterator[tuple[str, dict[str, Any]]]:
    usage = {"input_tokens": says.tokens[0], "output_tokens": 1}
    message = {"id": "msg", "type": "message", "role": "assistant", "model": "m", "content": [], "usage": usage}
    yield "message_start", {"message": {**message, "stop_reason": None, "stop_sequence": None}}
    blocks: list[tuple[dict[str, Any], dict[str, Any]]] = []
    if says.text:
        blocks.append(({"type": "text", "text": ""}, {"type": "text_delta", "text": says.text}))
    for i, (name, arguments) in enumerate(says.calls):
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        start = {"type": "tool_use", "id": f"call-{i}", "name": name, "input": {}}
        blocks.append((start, {"type": "input_json_delta", "partial_json": text}))
    for i, (start, delta) in enumerate(blocks):
        yield "content_block_start", {"index": i, "content_block": start}
        if says.cut:
            raise Cut
        if says.overloaded:
            yield "error", {"error": {"type": "overloaded_error", "message": "Overloaded"}}
            return
        yield "content_block_delta", {"index": i, "delta": delta}
        yield "content_block_stop", {"index": i}
    reason = "tool_use" if says.calls else "end_turn"
    yield (
        "message_delta",
        {"delta": {"stop_reason": reason, "stop_sequence": None}, "usage": {"output_tokens": says.tokens[1]}},
    )
    yield "message_stop", {}


def openai_events(says: Says) -> Iterator[dict[str, Any]]:
    def chunk(delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": None, **more}
        return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}

    yield chunk({"role": "assistant", "content": says.text or None})
    if says.cut:
        raise Cut
    if says.overloaded:
        yield {"error": {"type": "server_error", "message": "Overloaded", "code": None, "param": None}}
        return
    for i, (name, arguments) in enumerate(says.calls):
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        function = {"name": name, "arguments": ""}
        yield chunk({"tool_calls": [{"index": i, "id": f"call-{i}", "type": "function", "function": function}]})
        for part in (text[: len(text) // 2], text[len(text) // 2 :]):
            yield chunk({"tool_calls": [{"index": i, "function": {"arguments": part}}]})
    yield chunk({}, finish_reason="tool_calls" if says.calls else "stop")
    total = {"prompt_tokens": says.tokens[0], "completion_tokens": says.tokens[1], "total_tokens": sum(says.tokens)}
    yield {**chunk({}), "choices": [], "usage": total}


def whole(says: Says, anthropic: bool) -> dict[str, Any]:
    """The reply to a request that does not ask for a stream."""
    tokens_in, tokens_out = says.tokens
    if anthropic:
        return {
            "id": "msg", "type": "message", "role": "assistant", "model": "m", "stop_sequence": None,
            "content": [{"type": "text", "text": says.text}],
            "stop_reason": "refusal" if says.refusal else "end_turn",
            "usage": {"input_tokens": tokens_in, "output_tokens": tokens_out},
        }  # fmt: skip
    said = {"content": None, "refusal": "no"} if says.refusal else {"content": says.text}
    return {
        "id": "c", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", **said}}],
        "usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": sum(says.tokens)},
    }  # fmt: skip


class ModelServer:
    """Answers request after request as scripted, the last one for ever; a function is given the request's JSON body.
    `requests`: these bodies."""

    def __init__(self, *script: Says | Fails | Callable[[dict[str, Any]], Says]) -> None:
        self.script, self.requests = list(script), list[dict[str, Any]]()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.requests.append(body)
                answer = server.script.pop(0) if len(server.script) > 1 else server.script[0]
                if callable(answer):
                    answer = answer(body)
                if isinstance(answer, Fails):
                    self._fail(answer)
                elif body.get("stream"):
                    self._stream(answer)
                else:
                    time.sleep(answer.seconds)
                    self._answer(answer)

            def _fail(self, answer: Fails) -> None:
                data = json.dumps({"type": "error", **answer.body}).encode()
                self.send_response(answer.status)
                headers = {"content-type": "application/json", "content-length": str(len(data)), **answer.headers}
                for key, value in headers.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(data)

            def _answer(self, says: Says) -> None:
                data = json.dumps(whole(says, self.path.endswith("/messages"))).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(OSError):  # it was tired of waiting
                    self.wfile.write(data[: len(data) // 2] if says.cut else data)
                self.close_connection = says.cut or says.seconds > 0  # may be gone

            def _stream(self, says: Says) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                try:
                    if self.path.endswith("/messages"):
                        for name, event in anthropic_events(says):
                            self._chunk(f"event: {name}\ndata: {json.dumps({'type': name, **event})}\n\n")
                    else:
                        for event in openai_events(says):
                            self._chunk(f"data: {json.dumps(event)}\n\n")
                        self._chunk("data: [DONE]\n\n")
                    self._chunk("")
                except Cut:
                    self.close_connection = True

            def _chunk(self, text: str) -> None:
                data = text.encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.thread.join()


@contextlib.contextmanager
def serving(*script: Says | Fails | Callable[[dict[str, Any]], Says]) -> Iterator[ModelServer]:
    server = ModelServer(*script)
    try:
        yield server
    finally:
        server.close()

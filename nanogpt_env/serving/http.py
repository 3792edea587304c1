"""MCP over HTTP for several agents: each episode has a path and a token of its own. Needs `nanogpt_env[mcp]`."""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import anyio
import uvicorn
from mcp.server.mcpserver import MCPServer
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanogpt_env.actions import MAX_ACTION_BYTES
from nanogpt_env.errors import ActionError

MAX_BODY = 2 * MAX_ACTION_BYTES
BODY_S = 30.0
"""for the body of a request to arrive"""
CONNECTIONS = 64
ENDING_S = 2


@dataclass(frozen=True)
class Door:
    """One episode's. token: None to let in whoever comes."""

    server: MCPServer[object]
    token: str | None


class Guard:
    """Lets in who has the token, and gives a request's body a time to arrive."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._known(scope):
            headers = {"WWW-Authenticate": "Bearer"}
            await JSONResponse({"error": "this episode needs its token"}, 401, headers)(scope, receive, send)
            return
        whole, latest = False, anyio.current_time() + BODY_S

        async def in_time() -> Message:
            nonlocal whole
            if whole:  # what comes then is the end of the connection
                return await receive()
            with anyio.move_on_after(latest - anyio.current_time()):
                message = await receive()
                whole = not message.get("more_body", False)
                return message
            return {"type": "http.disconnect"}

        await self.app(scope, in_time, send)

    def _known(self, scope: Scope) -> bool:
        if self.token is None:
            return True
        given = [value for key, value in scope["headers"] if key == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], f"Bearer {self.token}".encode())


def application(doors: Mapping[str, Door], host: str) -> Starlette:
    """Episodes by name, each at /NAME/mcp."""
    apps = {
        name: door.server.streamable_http_app(host=host, max_request_body_size=MAX_BODY) for name, door in doors.items()
    }

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for door in doors.values():
                await stack.enter_async_context(door.server.session_manager.run())
            yield

    routes = [Mount(f"/{name}", Guard(app, doors[name].token)) for name, app in apps.items()]
    return Starlette(routes=routes, lifespan=lifespan)


def listen(host: str, port: int) -> socket.socket:
    """Raises `ActionError`."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    except (OSError, OverflowError) as error:
        raise ActionError(f"cannot listen at {host}:{port}: {error}") from None


def run(app: Starlette, at: socket.socket) -> None:
    """Until Ctrl-C or SIGTERM."""
    config = uvicorn.Config(
        app, log_level="warning", limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=ENDING_S, lifespan="on"
    )
    uvicorn.Server(config).run(sockets=[at])


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

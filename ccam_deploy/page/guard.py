"""What stands between the network and the page's server: few paths, small bodies, no strangers."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import quote

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_API = "/gradio_api"
_PLAIN = {"/", "/config", "/favicon.ico", "/theme.css", "/robots.txt"}
_PLAIN |= {f"{_API}/{name}" for name in ("heartbeat", "startup-events", "theme.css", "info")}
_PLAIN |= {f"{_API}/{name}" for name in ("queue/join", "queue/data", "upload", "upload_progress")}
_BELOW = ("/assets/", "/static/", f"{_API}/heartbeat/")
_PARTS_UP = re.compile(r"(^|/)\.\.?(/|$)|//|\\|\0")
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
"""What the page may load: nothing from other servers, and nobody may frame it."""
_HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


class Guard:
    """An ASGI application in front of another, which it keeps most of the web away from.

    Args:
        app: The application.
        most_bytes: The largest body of a request.
        hosts: The names that the server answers to, without ports; empty for any. Other pages
            in a visitor's browser cannot reach it under a name of their own then.
        uploads: The folder of files that visitors sent, which they may see again; no other file
            is served.
        on_end: Called when the server ends, before it waits for calls that still run.
    """

    def __init__(
        self,
        app: App,
        most_bytes: int,
        hosts: frozenset[str],
        uploads: str,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._app = app
        self._on_end = on_end
        self._most_bytes = most_bytes
        self._hosts = hosts
        self._shown = tuple(
            f"{_API}/file={form}/" for form in {uploads.rstrip("/"), quote(uploads.rstrip("/"))}
        )

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, self._until_end(receive), send)
            return
        if scope["type"] != "http":
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        await self._app(scope, _Limited(receive, self._most_bytes), _with_headers(send))

    def _until_end(self, receive: Receive) -> Receive:
        async def receiving() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                self._on_end()
            return message

        return receiving

    def _refusal(self, scope: Message, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """The status and line that a request is refused with."""
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts and _without_port(host) not in self._hosts:
            return 421, "this server does not answer to that name"
        if not self._serves(str(scope["path"])):
            return 404, "there is no such page"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._most_bytes:
            return 413, f"a request may have {self._most_bytes} bytes"
        return None

    def _serves(self, path: str) -> bool:
        if _PARTS_UP.search(path):
            return False
        return path in _PLAIN or path.startswith((*_BELOW, *self._shown))


class _Limited:
    """Passes a request's body on, up to a number of bytes; then it ends the connection.

    A body in chunks does not tell its length beforehand.
    """

    def __init__(self, receive: Receive, most_bytes: int) -> None:
        self._receive = receive
        self._left = most_bytes

    async def __call__(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        return message if self._left >= 0 else {"type": "http.disconnect"}


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
        await send(message)

    return sending


async def _answer(send: Send, status: int, line: str) -> None:
    body = f"{line}\n".encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *_HEADERS,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _without_port(host: str) -> str:
    """A Host header's name, IPv6 addresses in brackets included."""
    return re.sub(r":\d*$", "", host).strip("[]").lower()

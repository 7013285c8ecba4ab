"""The guard in front of the page's server: what passes, what does not, and what is added."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ccam_deploy.page.guard import POLICY, Guard, Message

UPLOADS = "/tmp/up loads"


class Behind:
    """An application that answers everything, and remembers what reached it."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.body = b""
        self.cut = False

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        self.reached.append(str(scope.get("path", scope["type"])))
        if scope["type"] != "http":
            return
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.cut = True
                return
            self.body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = [(b"content-type", b"text/html")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"behind"})


def ask(
    path: str,
    chunks: tuple[bytes, ...] = (b"",),
    host: str = "127.0.0.1:7860",
    length: str | None = None,
    hosts: frozenset[str] = frozenset({"127.0.0.1", "localhost", "::1"}),
) -> tuple[int, dict[bytes, bytes], bytes, Behind]:
    """Send a request; the status (0 for none), headers, body, and what reached the application."""
    behind = Behind()
    guard = Guard(behind, 100, hosts, UPLOADS)
    headers = [(b"Host", host.encode())]
    if length is not None:
        headers.append((b"Content-Length", length.encode()))
    waiting = [
        {"type": "http.request", "body": chunk, "more_body": n + 1 < len(chunks)}
        for n, chunk in enumerate(chunks)
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        return waiting.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Message = {"type": "http", "path": path, "headers": headers, "method": "POST"}
    asyncio.run(guard(scope, receive, send))
    if not sent:
        return 0, {}, b"", behind
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), body, behind


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/config", "/theme.css", "/assets/index.js", "/static/js/a.js"),
        *("/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/upload"),
        "/gradio_api/heartbeat/abc",
        f"/gradio_api/file={UPLOADS}/1234/cat.png",
    ],
)
def test_the_page_s_own_paths_pass(path: str) -> None:
    status, headers, body, behind = ask(path)
    assert (status, body, behind.reached) == (200, b"behind", [path])
    assert headers[b"content-security-policy"].decode() == POLICY
    assert headers[b"x-content-type-options"] == b"nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=manifest.json",
        f"/gradio_api/file={UPLOADS}",
        f"/gradio_api/file={UPLOADS}/../../etc/passwd",
        f"/gradio_api/file={UPLOADS}/a//etc/passwd",
        f"/gradio_api/file={UPLOADS}beside/a.png",
        "/gradio_api/file/etc/passwd",
        "/assets/../../etc/passwd",
        "/static/./a",
        "/static/a\\..\\b",
        "/static/a\0",
        "/gradio_api/proxy=http://example.org/",
        "/gradio_api/run/predict",
        "/gradio_api/call/predict",
        "/gradio_api/vibe-edit/",
        "/gradio_api/component_server",
        "/monitoring",
        "/gradio_api/runs",
        "/docs",
        "",
        "//",
    ],
)
def test_all_others_do_not(path: str) -> None:
    status, headers, body, behind = ask(path)
    assert (status, body, behind.reached) == (404, b"there is no such page\n", [])
    assert b"content-security-policy" in headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:7860", 200),
        ("LOCALHOST", 200),
        ("[::1]:80", 200),
        ("evil.example:7860", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
    ],
)
def test_a_page_elsewhere_cannot_give_this_server_its_own_name(host: str, status: int) -> None:
    assert ask("/", host=host)[0] == status
    assert ask("/", host=host, hosts=frozenset())[0] == 200


@pytest.mark.parametrize(
    ("length", "status"),
    [("100", 200), ("101", 413), ("9" * 5000, 413), ("-1", 413), ("x", 413), ("", 413)],
)
def test_bodies_that_say_to_be_large_are_refused(length: str, status: int) -> None:
    assert ask("/gradio_api/upload", length=length)[0] == status


def test_bodies_in_chunks_are_cut_off() -> None:
    whole = ask("/gradio_api/upload", (b"x" * 60, b"y" * 40))
    assert (whole[0], len(whole[3].body), whole[3].cut) == (200, 100, False)
    status, _, _, behind = ask("/gradio_api/upload", (b"x" * 60, b"y" * 41))
    assert (status, len(behind.body), behind.cut) == (0, 60, True)


def test_other_protocols() -> None:
    behind = Behind()
    guard = Guard(behind, 100, frozenset(), UPLOADS)

    async def nothing(*_: Any) -> Any:
        raise AssertionError

    asyncio.run(guard({"type": "lifespan"}, nothing, nothing))
    asyncio.run(guard({"type": "websocket", "path": "/", "headers": []}, nothing, nothing))
    assert behind.reached == ["lifespan"]

"""A server that speaks as much of Triton's HTTP as the probe asks for."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TENSOR = {"name": "IMAGES", "data_type": "TYPE_FP32", "dims": ["3", "4", "4"]}
CONFIG = {
    "max_batch_size": 8,
    "input": [
        TENSOR,
        {"name": "TARGETS", "data_type": "TYPE_INT32", "dims": [1], "optional": True},
    ],
    "output": [
        {"name": "SALIENCY", "data_type": "TYPE_FP32", "dims": [4, 4]},
        {"name": "ANY", "data_type": "TYPE_STRING", "dims": [-1]},
        {"name": "CLASS", "data_type": "TYPE_INT32", "dims": [1]},
    ],
}


class FakeTriton(ThreadingHTTPServer):
    """Answers with what its fields say, and keeps what it was asked.

    Attributes:
        configs: The configuration of each model.
        answers: Status and message of an inference, by model; 200 where there is none.
        asked: Method, path, headers and body of each request.
        ready: Whether it says so.
        answered: How many requests its models have answered.
        pace: How many more they answer each time that they are counted.
        busy: The only model that answers others; empty for all.
        release: What slow answers wait for.
    """

    def __init__(self) -> None:
        self.configs: dict[str, dict[str, Any]] = {"ccam": CONFIG}
        self.answers: dict[str, tuple[int, str]] = {}
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.ready = True
        self.answered = self.pace = 0
        self.busy = ""
        self.release = threading.Event()
        self.release.set()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str) -> tuple[int, Any]:
        match path.strip("/").split("/"):
            case ["v2", "health", "ready"]:
                return 200 if self.ready else 400, {}
            case ["v2", "models", "stats"]:
                return 200, {"model_stats": [{"name": name} for name in self.configs]}
            case ["v2", "models", name, "config"] if name in self.configs:
                return 200, self.configs[name]
            case ["v2", "models", name, "stats"] if name in self.configs:
                count = self.answered if self.busy in ("", name) else 0
                kinds = {"success": {"count": count}, "fail": {"count": 0}}
                self.answered += self.pace
                return 200, {"model_stats": [{"name": name, "inference_stats": kinds}]}
            case ["v2", "models", name, "infer"] if name in self.configs:
                self.release.wait(30)
                status, words = self.answers.get(name, (200, ""))
                return status, {"error": words} if words else {"outputs": []}
            case ["v2", "models", name, _]:
                return 404, {"error": f"Request for unknown model: '{name}' is not found"}
        return 404, {"error": "Not Found"}


class _Handler(BaseHTTPRequestHandler):
    server: FakeTriton

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        self.server.asked.append((self.command, self.path, dict(self.headers.items()), body))
        status, value = self.server.answer(self.path)
        content = json.dumps(value).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:
            pass  # the probe did not wait

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@contextmanager
def fake_triton() -> Iterator[FakeTriton]:
    with FakeTriton() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.release.set()
            server.shutdown()
            thread.join()

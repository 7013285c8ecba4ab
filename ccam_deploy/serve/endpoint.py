"""Triton's HTTP endpoint with the standard library alone: what the probe and the watch ask for.

A probe runs every few seconds, in a process of its own where Kubernetes asks, so it has to start
fast; clients of the models use tritonclient.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from ccam_deploy.errors import OptionError, ServerError, brief

_REFUSED = 400
_UNKNOWN_MODEL = "Request for unknown model"


@dataclass(frozen=True)
class Tensor:
    """An input of a model as it goes over the wire.

    Attributes:
        name: The input's name.
        shape: Its shape, with the batch where the model has one.
        datatype: Its type, such as "FP32" or "BYTES".
        content: Its bytes, little-endian, row by row; strings begin with their length.
    """

    name: str
    shape: tuple[int, ...]
    datatype: str
    content: bytes


class HttpEndpoint:
    """The HTTP endpoint of a server, asked with a new connection each time.

    Args:
        url: Such as "http://127.0.0.1:8000"; a path before "/v2" is kept.
        timeout: Seconds that an answer may take.
        headers: Headers of each request.

    Raises:
        OptionError: The URL is none of HTTP's.

    Its methods raise ServerError where the server cannot be reached or refuses, and TimeoutError
    where it does not answer in time.
    """

    def __init__(
        self, url: str, timeout: float = 10.0, headers: Mapping[str, str] | None = None
    ) -> None:
        self.url = url.rstrip("/")
        self._timeout = timeout
        self._headers = dict(headers or {})
        try:
            parts = urlsplit(self.url)
            self._place = (parts.hostname or "", parts.port)
        except ValueError as error:
            raise OptionError(f'"{url}" is no address of a server: {error}') from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OptionError(f'"{url}" is no address of a server; one is http://127.0.0.1:8000')
        self._secure = parts.scheme == "https"
        self._path = parts.path

    def ready(self) -> bool:
        """Tell whether the server says that it and all of its models are ready."""
        return self._ask("GET", "/health/ready")[0] == 200

    def models(self) -> list[str]:
        """List the models that the server has loaded."""
        statistics = self._json("GET", "/models/stats")["model_stats"]
        return list(dict.fromkeys(entry["name"] for entry in statistics))

    def config(self, model: str) -> dict[str, Any]:
        """Return a model's configuration as the server completed it."""
        config: dict[str, Any] = self._json("GET", f"/models/{quote(model)}/config")
        return config

    def counts(self, model: str) -> tuple[int, int]:
        """Return how many requests a model has answered and failed since it was loaded."""
        return count_requests(self._json("GET", f"/models/{quote(model)}/stats"))

    def infer(self, model: str, inputs: Sequence[Tensor], outputs: Sequence[str]) -> str:
        """Send a request to a model.

        Args:
            model: Its name.
            inputs: Its inputs.
            outputs: The outputs to ask for.

        Returns:
            Nothing where it was answered; the message where the model refused it.

        Raises:
            TimeoutError: No answer came in time: the model is busy, or stuck.
            ServerError: The model failed, or there is none.
        """
        described = [
            {
                "name": tensor.name,
                "shape": tensor.shape,
                "datatype": tensor.datatype,
                "parameters": {"binary_data_size": len(tensor.content)},
            }
            for tensor in inputs
        ]
        header = json.dumps(
            {"inputs": described, "outputs": [{"name": name} for name in outputs]}
        ).encode()
        status, body = self._ask(
            "POST",
            f"/models/{quote(model)}/infer",
            b"".join([header, *(tensor.content for tensor in inputs)]),
            {
                "Content-Type": "application/octet-stream",
                "Inference-Header-Content-Length": str(len(header)),
            },
        )
        if status == 200:
            return ""
        message = _message(status, body)
        if status == _REFUSED and not message.startswith(_UNKNOWN_MODEL):
            return message
        raise ServerError(message)

    def load(self, model: str, timeout: float) -> None:
        """Load a model, and wait for it."""
        self._json("POST", f"/repository/models/{quote(model)}/load", timeout=timeout)

    def unload(
        self, model: str, timeout: float, abandoned: Callable[[], bool] = lambda: False
    ) -> bool:
        """Unload a model, which answers what it has accepted and refuses all else.

        A model that is loaded again before it is gone is never quite unloaded, and holds up the
        server's end.

        Args:
            model: Its name.
            timeout: Seconds to wait until it is gone.
            abandoned: Whether there is nothing to wait for, as its processes are dead.

        Returns:
            Whether it has nothing more to answer.
        """
        self._json("POST", f"/repository/models/{quote(model)}/unload")
        until = time.monotonic() + timeout
        while self._state(model) == "UNLOADING" and not abandoned():
            if time.monotonic() >= until:
                return False
            time.sleep(0.05)
        return True

    def _state(self, model: str) -> str:
        index = self._json("POST", "/repository/index")
        return next((entry.get("state", "") for entry in index if entry["name"] == model), "")

    def _json(self, method: str, path: str, timeout: float | None = None) -> Any:
        status, body = self._ask(method, path, timeout=timeout)
        if status != 200:
            raise ServerError(_message(status, body))
        try:
            return json.loads(body) if body else {}
        except ValueError as error:
            raise ServerError(f"{self.url} does not answer as a Triton server does") from error

    def _ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> tuple[int, bytes]:
        host, port = self._place
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(host, port, timeout=timeout or self._timeout)
        try:
            connection.request(
                method, f"{self._path}/v2{path}", body, {**self._headers, **(headers or {})}
            )
            response = connection.getresponse()
            return response.status, response.read()
        except TimeoutError as error:
            raise TimeoutError(f"no answer in {timeout or self._timeout:g} s") from error
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or brief(error)
            raise ServerError(f"{self.url} cannot be reached: {reason}") from error
        finally:
            connection.close()


def count_requests(statistics: Mapping[str, Any]) -> tuple[int, int]:
    """Add up how many requests a model has answered and failed.

    Args:
        statistics: Of all of its versions, as the server gives them; gRPC leaves zeros out.
    """
    versions = [entry.get("inference_stats", {}) for entry in statistics.get("model_stats", [])]
    answered, failed = (
        sum(int(version.get(kind, {}).get("count", 0)) for version in versions)
        for kind in ("success", "fail")
    )
    return answered, failed


def _message(status: int, body: bytes) -> str:
    """The server's words on a failure, as one line."""
    try:
        words = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        words = ""
    return brief(RuntimeError(words)) if words else f"the server answers with status {status}"

"""Whether a server's models live, found out by asking each to answer a request.

A server says "ready" of a model whose process is dead; only an inference tells.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ccam_deploy.errors import OptionError, ServerError, brief
from ccam_deploy.extras import install
from ccam_deploy.serve.endpoint import HttpEndpoint, Tensor, count_requests

_SIZES = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "BF16": 2,
    "FP32": 4,
    "FP64": 8,
}
_PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAAAAAA6mKC9AAAAEUlEQVR42mNsYEAFTAwjWgAAmZAAoFDIQrAAAAAASUVORK5CYII="
)
"""A grey PNG of 16 × 16 pixels, which a model of encoded images can answer."""


@dataclass(frozen=True)
class ModelHealth:
    """What a model did with a request.

    Attributes:
        name: The model.
        alive: Whether it answered; to refuse the request is an answer too.
        milliseconds: How long that took.
        detail: What it said where it did not answer, or refused; else empty.
    """

    name: str
    alive: bool
    milliseconds: float
    detail: str = ""

    def __str__(self) -> str:
        """Tell what a model that lives did."""
        answer = f"{self.name} in {self.milliseconds:.0f} ms"
        return f"{answer} ({self.detail})" if self.detail else answer


@dataclass(frozen=True)
class ServerHealth:
    """What was found out about a server.

    Attributes:
        url: Its address.
        models: Its models that were asked.
        detail: Why it is not well, beside its models; else empty.
    """

    url: str
    models: tuple[ModelHealth, ...] = ()
    detail: str = ""

    @property
    def alive(self) -> bool:
        """Whether the server is ready and all models that were asked answered."""
        return not self.detail and all(model.alive for model in self.models)

    def __str__(self) -> str:
        """Tell it in one line: all models that live, or what is wrong."""
        wrong = [f"{model.name}: {model.detail}" for model in self.models if not model.alive]
        if not self.alive:
            return f"{self.url} is not well: {'; '.join([self.detail, *wrong]).strip('; ')}"
        return f"{self.url} is alive: {', '.join(map(str, self.models))}"


class Endpoint(Protocol):
    """What a probe asks of a server, over HTTP or gRPC."""

    def ready(self) -> bool:
        """Tell whether the server says that it is ready."""

    def models(self) -> list[str]:
        """List the models that are loaded."""

    def config(self, model: str) -> dict[str, Any]:
        """Return a model's configuration."""

    def counts(self, model: str) -> tuple[int, int]:
        """Return how many requests a model has answered and failed."""

    def infer(self, model: str, inputs: Sequence[Tensor], outputs: Sequence[str]) -> str:
        """Send a request; return why it was refused, nothing where it was answered."""


def check(url: str, models: Sequence[str] = (), timeout: float = 10.0) -> ServerHealth:
    """Probe a server: each model gets one small request.

    Args:
        url: Such as "http://127.0.0.1:8000" or "grpc://127.0.0.1:8001"; HTTP where it has no
            scheme.
        models: The models to ask; all that are loaded where there are none.
        timeout: Seconds that each answer may take.

    Returns:
        What was found out; a server that cannot be reached is not well.

    Raises:
        OptionError: The URL is of no use.
        BackendError: gRPC is asked for, and its package is missing.
    """
    endpoint = _open(url, timeout)
    try:
        names = list(models) or endpoint.models()
        if not names:
            return ServerHealth(url, detail="no model is loaded")
        found = tuple(_ask_in_time(endpoint, name, timeout) for name in names)
        ready = bool(models) or endpoint.ready()
        return ServerHealth(url, found, "" if ready else "it says that it is not ready")
    except (ServerError, TimeoutError) as error:
        return ServerHealth(url, detail=str(error))


def _ask_in_time(endpoint: Endpoint, model: str, timeout: float) -> ModelHealth:
    """Ask a model; where it or one that it calls answers others instead, it is busy, not dead.

    One whose process has died refuses at once.
    """
    before = 0
    try:
        before = _answered(endpoint)
        return ask(endpoint, model)
    except TimeoutError as error:
        others = _answered(endpoint) - before
        detail = f"busy, it answered {others} other requests" if others > 0 else str(error)
        return ModelHealth(model, others > 0, 1000 * timeout, detail)
    except ServerError as error:
        return ModelHealth(model, False, 0.0, str(error))


def _answered(endpoint: Endpoint) -> int:
    """How many requests all models of a server have answered."""
    return sum(endpoint.counts(model)[0] for model in endpoint.models())


def ask(endpoint: Endpoint, model: str) -> ModelHealth:
    """Send a model a small request, of zeros and for its smallest output.

    Args:
        endpoint: The server.
        model: The model's name.

    Returns:
        What it did.

    Raises:
        TimeoutError: It gave no answer in time, which may only mean that it is busy.
    """
    begun = time.perf_counter()
    alive = True
    try:
        inputs, output = request_for(endpoint.config(model))
        detail = endpoint.infer(model, inputs, [output])
    except ServerError as error:
        alive, detail = False, str(error)
    return ModelHealth(model, alive, round(1000 * (time.perf_counter() - begun), 3), detail)


def request_for(config: dict[str, Any]) -> tuple[list[Tensor], str]:
    """Make the request of a probe.

    Args:
        config: A model's configuration.

    Returns:
        Zeros for each input that has to be there, or a tiny picture where it holds bytes, with
        lengths of 1 where the model takes any; and the name of the smallest output.

    Raises:
        ServerError: It is the configuration of no model that can be asked.
    """
    batch = (1,) if int(config.get("max_batch_size", 0)) else ()
    required = [entry for entry in config.get("input", []) if not entry.get("optional")]
    outputs = config.get("output", [])
    if not outputs:
        raise ServerError("the model's configuration lists no outputs")
    return [_zeros(entry, batch) for entry in required], min(outputs, key=_cost)["name"]


def _zeros(entry: dict[str, Any], batch: tuple[int, ...]) -> Tensor:
    shape = batch + tuple(max(int(length), 1) for length in entry["dims"])
    datatype = str(entry["data_type"]).removeprefix("TYPE_")
    if datatype == "STRING":
        one = len(_PICTURE).to_bytes(4, "little") + _PICTURE
        return Tensor(entry["name"], shape, "BYTES", one * math.prod(shape))
    if datatype not in _SIZES:
        raise ServerError(f'input "{entry["name"]}" has the type {datatype}, which is unknown')
    return Tensor(entry["name"], shape, datatype, bytes(_SIZES[datatype] * math.prod(shape)))


def _cost(output: dict[str, Any]) -> tuple[float, bool]:
    """What makes an output dearer than others: its elements, and strings, which may be files."""
    lengths = [int(length) for length in output["dims"]]
    elements = math.prod(lengths) if min(lengths, default=1) > 0 else math.inf
    return elements, output["data_type"] == "TYPE_STRING"


def _open(url: str, timeout: float) -> Endpoint:
    scheme, separator, place = url.partition("://")
    if separator and scheme == "grpc":
        return _GrpcEndpoint(place, timeout)
    return HttpEndpoint(url if separator else f"http://{url}", timeout)


class _GrpcEndpoint:
    """The gRPC endpoint of a server, by tritonclient."""

    def __init__(self, place: str, timeout: float) -> None:
        try:
            import tritonclient.grpc as triton
        except ImportError as error:
            raise OptionError(f"gRPC needs tritonclient; {install('serve')}") from error
        self._triton = triton
        self._client = triton.InferenceServerClient(place)
        self._timeout = timeout

    def ready(self) -> bool:
        return bool(self._call(self._client.is_server_ready))

    def models(self) -> list[str]:
        statistics = self._call(self._client.get_inference_statistics, as_json=True)
        return list(dict.fromkeys(entry["name"] for entry in statistics.get("model_stats", [])))

    def config(self, model: str) -> dict[str, Any]:
        answer = self._call(self._client.get_model_config, model, as_json=True)
        config: dict[str, Any] = answer["config"]
        return config

    def counts(self, model: str) -> tuple[int, int]:
        answer = self._call(self._client.get_inference_statistics, model, as_json=True)
        return count_requests(answer)

    def infer(self, model: str, inputs: Sequence[Tensor], outputs: Sequence[str]) -> str:
        tensors = []
        for tensor in inputs:
            given = self._triton.InferInput(tensor.name, tensor.shape, tensor.datatype)
            given._raw_content = tensor.content
            tensors.append(given)
        wanted = [self._triton.InferRequestedOutput(name) for name in outputs]
        try:
            self._call(self._client.infer, model, tensors, outputs=wanted)
        except ServerError as error:
            if _status(error.__cause__) == "INVALID_ARGUMENT":
                return str(error)
            raise
        return ""

    def _call(self, method: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return method(*arguments, client_timeout=self._timeout, **options)
        except self._triton.InferenceServerException as error:
            if _status(error) == "DEADLINE_EXCEEDED":
                raise TimeoutError(f"no answer in {self._timeout:g} s") from error
            raise ServerError(brief(RuntimeError(error.message() or _status(error)))) from error


def _status(error: Any) -> str:
    """The name of gRPC's status code in an error of tritonclient."""
    return str(error.status() or "").removeprefix("StatusCode.")

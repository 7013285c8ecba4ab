"""What Triton's Python backend gives to models, as far as they use it, in plain Python.

Importing this module makes it what `import triton_python_backend_utils` finds.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.engines.cuda.dlpack import capsule_of, tensor_of

sys.modules["triton_python_backend_utils"] = sys.modules[__name__]

TRITONSERVER_MEMORY_CPU = 0

counts: Counter[tuple[str, ...]] = Counter()
"""The value of each metric, by its name, its model and its other labels, sorted by name."""
observed: dict[tuple[str, ...], list[float]] = {}
log: list[str] = []
loaded: dict[str, Callable[[Sequence[Any]], list[Any]]] = {}
"""What answers requests of models to each other, by the model's name."""


def reset() -> None:
    for store in (counts, observed, log, loaded):
        store.clear()


class TritonModelException(Exception):  # noqa: N818
    pass


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE = range(5)

    def __init__(self, message: str, code: int = UNKNOWN) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    def __init__(self, name: str, values: NDArray[Any]) -> None:
        assert values.flags.c_contiguous
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        return self._values

    def is_cpu(self) -> bool:
        return True

    @classmethod
    def from_dlpack(cls, name: str, capsule: Any) -> DeviceMemoryTensor:
        return DeviceMemoryTensor(name, tensor_of(capsule), capsule)


class DeviceMemoryTensor(Tensor):
    """A tensor in the memory of a device, which is the host's here."""

    def __init__(self, name: str, tensor: DeviceTensor, capsule: Any = None) -> None:
        self._name, self.tensor, self._capsule = name, tensor, capsule

    def is_cpu(self) -> bool:
        return False

    def as_numpy(self) -> NDArray[Any]:
        raise RuntimeError("Tensor is stored in GPU and cannot be converted to NumPy.")

    def to_dlpack(self) -> Any:
        return capsule_of(self.tensor, lambda: None)

    def content(self) -> NDArray[Any]:
        memory = ctypes.string_at(self.tensor.address, self.tensor.bytes)
        return np.frombuffer(memory, self.tensor.dtype).reshape(self.tensor.shape)


class PreferredMemory:
    def __init__(self, kind: int, device: int) -> None:
        assert (kind, device) == (TRITONSERVER_MEMORY_CPU, 0)


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor], error: TritonError | None = None) -> None:
        self.tensors, self._error = {tensor.name(): tensor for tensor in output_tensors}, error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError:
        assert self._error
        return self._error


class InferenceRequest:
    def __init__(
        self,
        inputs: Sequence[Tensor],
        requested_output_names: Sequence[str],
        model_name: str = "",
        preferred_memory: PreferredMemory | None = None,
        parameters: Mapping[str, object] | None = None,
    ) -> None:
        self.tensors = {tensor.name(): tensor for tensor in inputs}
        self._names, self._model = list(requested_output_names), model_name
        self._parameters = parameters

    def requested_output_names(self) -> list[str]:
        return self._names

    def parameters(self) -> str:
        return json.dumps(self._parameters) if self._parameters else ""

    def exec(self) -> InferenceResponse:
        if self._model not in loaded:
            raise TritonModelException(f"{self._model} is not ready")
        (answer,) = loaded[self._model]([self])
        assert isinstance(answer, InferenceResponse)
        if answer.has_error():  # the server does not keep the code
            error = TritonError(answer.error().message(), TritonError.INTERNAL)
            return InferenceResponse([], error)
        return answer


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return request.tensors.get(name)


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
    return response.tensors.get(name)


class Logger:
    @staticmethod
    def log_error(text: str) -> None:
        log.append(text)

    log_info = log_warn = log_error


class _Metric:
    def __init__(self, key: tuple[str, ...]) -> None:
        self._key = key

    def increment(self, value: float) -> None:
        assert value >= 0
        counts[self._key] += value  # type: ignore[assignment]

    def observe(self, value: float) -> None:
        observed.setdefault(self._key, []).append(value)


class MetricFamily:
    COUNTER, GAUGE, HISTOGRAM = range(3)

    def __init__(self, name: str, description: str, kind: int) -> None:
        assert description
        self._name, self._kind = name, kind

    def Metric(  # noqa: N802
        self, labels: Mapping[str, str], buckets: Sequence[float] | None = None
    ) -> _Metric:
        assert (buckets is not None) == (self._kind == self.HISTOGRAM)
        rest = sorted((key, value) for key, value in labels.items() if key not in _COMMON)
        assert set(_COMMON) <= set(labels)
        return _Metric((self._name, labels["model"], *(value for _, value in rest)))


_COMMON = ("model", "version")


def request(
    tensors: Mapping[str, NDArray[Any] | DeviceTensor],
    wanted: Sequence[str],
    parameters: Mapping[str, object] | None = None,
) -> InferenceRequest:
    inputs = [
        DeviceMemoryTensor(name, values)
        if isinstance(values, DeviceTensor)
        else Tensor(name, np.ascontiguousarray(values))
        for name, values in tensors.items()
    ]
    return InferenceRequest(inputs, wanted, parameters=parameters)

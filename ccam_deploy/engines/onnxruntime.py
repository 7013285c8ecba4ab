"""ONNX Runtime, on the CPU or through its CUDA provider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ccam_deploy.engines.base import Array, Engine, TensorSpec
from ccam_deploy.errors import BackendError, brief

if TYPE_CHECKING:
    import onnxruntime

Device = Literal["cpu", "cuda"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(bool)": np.dtype(np.bool_),
}


class OnnxRuntimeEngine(Engine):
    """One ONNX graph in an ONNX Runtime session.

    threads: threads inside an operator; 0 lets ONNX Runtime choose. Raises BackendError where the
    device that was asked for is not the one that the session got.
    """

    def __init__(self, path: Path, device: Device = "cpu", threads: int = 0) -> None:
        self._path = path
        self._device = device
        self._threads = threads
        super().__init__()

    def _load_impl(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        runtime = _import()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 4  # errors come as exceptions
        # A bundle's sessions and the kernels take turns: a session that goes on spinning after
        # its run only takes the cores from the next one.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider = _PROVIDERS[self._device]
        if provider not in runtime.get_available_providers():
            raise BackendError(
                f"the installed ONNX Runtime has no {provider}; pip install ccam-deploy[gpu]"
            )
        try:
            self._session = runtime.InferenceSession(
                self._path, options, providers=[provider, *_fallback(self._device)]
            )
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot load {self._path}: {brief(error)}") from error
        got = self._session.get_providers()[0]
        if got != provider:
            raise BackendError(
                f"ONNX Runtime gave {got} where {provider} was asked for; "
                "see that onnxruntime-gpu, a GPU and its driver are there"
            )
        return _specs(self._session.get_inputs()), _specs(self._session.get_outputs())

    def _run_impl(self, feeds: Mapping[str, Array]) -> list[Array]:
        try:
            return list(self._session.run(None, dict(feeds)))
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed on {self._path}: {brief(error)}") from error

    def _close_impl(self) -> None:
        del self._session


def _fallback(device: Device) -> list[str]:
    """The CUDA provider hands operators that it lacks to the CPU."""
    return [_PROVIDERS["cpu"]] if device == "cuda" else []


def _specs(tensors: list[onnxruntime.NodeArg]) -> tuple[TensorSpec, ...]:
    for tensor in tensors:
        if tensor.type not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise BackendError(f'"{tensor.name}" is a {tensor.type}; graphs may hold {known}')
    return tuple(TensorSpec(t.name, _DTYPES[t.type], tuple(t.shape)) for t in tensors)


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "ONNX Runtime is not installed: pip install ccam-deploy[cpu] or ccam-deploy[gpu]"
        ) from error
    return onnxruntime


def devices() -> list[Device]:
    """The devices that the installed ONNX Runtime was built for."""
    built = _import().get_available_providers()
    return [device for device, provider in _PROVIDERS.items() if provider in built]  # type: ignore[misc]

"""ONNX Runtime, on the CPU or through its CUDA provider."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ccam_deploy.engines.base import Array, Engine, TensorSpec
from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.errors import BackendError, brief
from ccam_deploy.extras import REPLACE_ONNXRUNTIME, install
from ccam_deploy.files import is_utf8

if TYPE_CHECKING:
    import onnxruntime

Device = Literal["cpu", "cuda"]

PROVIDERS: dict[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_FATAL = 4
_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(bool)": np.dtype(np.bool_),
}


_CHANNELS_LAST = {"prefer_nhwc": "1"}
_CAPTURE = {"enable_cuda_graph": "1"}
_NO_CAPTURE = -1
_MOST_CAPTURED = 256
"""ONNX Runtime keeps what it captured as long as the session."""


class _CaptureRefusedError(BackendError):
    """ONNX Runtime cannot capture the runs of a graph."""


class OnnxRuntimeGraph:
    """An ONNX graph on tensors in a GPU's memory or, for tests, the host's; see DeviceGraph.

    On a GPU, ONNX Runtime captures the run of each set of tensors that is bound, and replays it:
    what is captured is not planned again when the number of rows changes. While it captures, CUDA
    lets no thread of the process allocate memory, so that this needs a moment without others.

    Attributes:
        inputs: See DeviceGraph.
        outputs: See DeviceGraph.
        limits: Empty: any number of rows may be given.
        capturable: False: its arena allocates while it runs, and it may leave operators to the CPU.
        replays_itself: Whether ONNX Runtime captures CUDA graphs of its own.
    """

    capturable = False

    def __init__(
        self,
        path: Path,
        device: Device,
        stream: int,
        tf32: bool = False,
        alone: Callable[[], bool] = lambda: True,
    ) -> None:
        """Load the graph.

        Args:
            path: The ONNX file.
            device: Where the tensors lie.
            stream: The handle of the CUDA stream to work on; 0 on the CPU.
            tf32: Whether a GPU may round the factors of float32 products to 10 bits of mantissa.
            alone: Tells whether no other thread uses the GPU, nor will until this slot's work ends;
                without that nothing is captured.

        Raises:
            BackendError: The graph cannot be loaded on the device.
        """
        self._path = path
        self._alone = alone
        self._device = device
        self._session, self._captures = _open_graph(path, device, stream, tf32)
        self.replays_itself = self._captures
        self.inputs = _specs(self._session.get_inputs())
        self.outputs = _specs(self._session.get_outputs())
        self.limits: Mapping[str, int] = {}
        self._uncaptured = self._options(_NO_CAPTURE)
        self._captured = 0

    def bind(self, tensors: Mapping[str, DeviceTensor]) -> Callable[[], None]:
        """See DeviceGraph. The second run or a later one is captured, and replayed from then on."""
        binding = self._binding(tensors)
        options, runs = self._uncaptured, 0

        def run() -> None:
            nonlocal options, runs
            if runs and options is self._uncaptured:
                options = self._next_captured()
            self._run(binding, options)
            runs += 1

        return run

    def _next_captured(self) -> Any:
        """The options of a run that is captured; of any other where that cannot be."""
        if not self._captures or self._captured >= _MOST_CAPTURED or not self._alone():
            return self._uncaptured
        self._captured += 1
        return self._options(self._captured)

    def launch(self, tensors: Mapping[str, DeviceTensor]) -> None:
        """Put a run on the stream; see DeviceGraph."""
        self._run(self._binding(tensors), self._uncaptured)

    def close(self) -> None:
        """Free the session."""
        del self._session

    def _binding(self, tensors: Mapping[str, DeviceTensor]) -> Any:
        binding = self._session.io_binding()
        for specs, bind in ((self.inputs, binding.bind_input), (self.outputs, binding.bind_output)):
            for spec in specs:
                tensor = tensors[spec.name]
                bind(spec.name, self._device, 0, tensor.dtype, tensor.shape, tensor.address)
        return binding

    def _run(self, binding: Any, options: Any) -> None:
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed on {self._path}: {brief(error)}") from error

    def _options(self, graph_id: int) -> Any:
        options = _import().RunOptions()
        # The stream keeps the order; the run must not wait for it.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self._captures:
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        return options


def _open_graph(
    path: Path, device: Device, stream: int, tf32: bool
) -> tuple[onnxruntime.InferenceSession, bool]:
    """Open a session in the fastest way that a graph allows, and say whether it captures runs.

    ONNX Runtime refuses to capture a graph of which it leaves a node to the CPU. Which nodes it
    leaves depends on the layout: not every operator has a kernel for channels last. These pay where
    tensor cores multiply; a graph's types are known once it is open.
    """
    if device == "cpu":
        return open_session(path, device, 1, stream), False
    products = {"use_tf32": str(int(tf32))}
    for options in (_CHANNELS_LAST | _CAPTURE, _CAPTURE, _CHANNELS_LAST):
        with suppress(_CaptureRefusedError):
            session = open_session(path, device, 1, stream, products | options)
            if options is _CAPTURE or tf32 or _is_half(session):
                return session, options is not _CHANNELS_LAST
            del session  # its memory goes before another is opened
    return open_session(path, device, 1, stream, products), False


def _is_half(session: onnxruntime.InferenceSession) -> bool:
    return any(value.type == "tensor(float16)" for value in session.get_inputs())


class OnnxRuntimeEngine(Engine):
    """One ONNX graph in an ONNX Runtime session.

    Raises:
        BackendError: The graph cannot be loaded on the device.
    """

    def __init__(self, path: Path, device: Device = "cpu", threads: int = 0) -> None:
        """Load the graph.

        Args:
            path: The ONNX file.
            device: Where to run it.
            threads: Threads inside an operator; 0 lets ONNX Runtime choose.
        """
        self._path = path
        self._device = device
        self._threads = threads
        super().__init__()

    def _load_impl(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        self._session = open_session(self._path, self._device, self._threads)
        return _specs(self._session.get_inputs()), _specs(self._session.get_outputs())

    def _run_impl(self, feeds: Mapping[str, Array]) -> list[Array]:
        try:
            return list(self._session.run(None, dict(feeds)))
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed on {self._path}: {brief(error)}") from error

    def _close_impl(self) -> None:
        del self._session


def open_session(
    model: Path | bytes,
    device: Device,
    threads: int = 0,
    stream: int = 0,
    cuda_options: Mapping[str, str] = MappingProxyType({}),
) -> onnxruntime.InferenceSession:
    """Load a model on a device and on no other.

    Args:
        model: A file, or its bytes.
        device: Where to run it.
        threads: Threads inside an operator; 0 lets ONNX Runtime choose.
        stream: The handle of a CUDA stream to work on; 0 lets ONNX Runtime create one.
        cuda_options: More options of the CUDA provider.

    Returns:
        The session.

    Raises:
        BackendError: The model cannot be loaded, or ONNX Runtime put it on another device.
    """
    runtime = _import()
    if isinstance(model, Path) and not is_utf8(model):
        raise BackendError(f"ONNX Runtime cannot open {model}: its path is not UTF-8; rename it")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _FATAL  # errors come as exceptions
    # A bundle's sessions and the kernels take turns: a session that spins after its run only
    # takes the cores from the next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Quantised graphs run as they are written: fused, FP8 comes out wrong on a CPU, and INT8 may
    # saturate where a GPU does not.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    provider = require_provider(device)
    providers: list[Any] = [provider]
    if device == "cuda":  # it hands operators that it lacks to the CPU
        settings = {
            "use_tf32": "0",  # on by default; it rounds the factors of float32 to 10 bits
            # A search for the fastest plan takes hundreds of milliseconds for each shape, and
            # found none that was faster.
            "cudnn_conv_algo_search": "HEURISTIC",
            **cuda_options,
        }
        if stream:
            settings["user_compute_stream"] = str(stream)
        providers = [(provider, settings), PROVIDERS["cpu"]]
        _load_cuda(runtime)
    # On a GPU a bias inside of a convolution takes twice the time of a sum of its own.
    left_out = {"ConvAddFusion"} if device == "cuda" else None
    try:
        # Its fallback would print to stdout, and go on with the CPU.
        session = runtime.InferenceSession(
            model, options, providers=providers, enable_fallback=0, disabled_optimizers=left_out
        )
    except Exception as error:
        if "graph capture" in str(error):
            raise _CaptureRefusedError(brief(error)) from error
        name = model if isinstance(model, Path) else "a model"
        raise BackendError(f"ONNX Runtime cannot load {name}: {brief(error)}") from error
    used = session.get_providers()[0]
    if used != provider:
        raise BackendError(
            f"ONNX Runtime gave {used} where {provider} was asked for; "
            "check that onnxruntime-gpu, a GPU and its driver are there"
        )
    if device == "cuda":
        _silence_default_logger(runtime)
    return session


@cache
def _load_cuda(runtime: Any) -> None:
    """Load CUDA and cuDNN from pip's packages; the system's loader may find those it cannot.

    This is done once for the process, because it swallows the output of all threads meanwhile.
    """
    with redirect_stdout(io.StringIO()):  # it prints the names of missing libraries
        runtime.preload_dlls()


@cache
def _silence_default_logger(runtime: Any) -> None:
    """Keep ONNX Runtime's default logger from writing anything but fatal errors to stderr.

    The CUDA provider logs two errors and a warning there, whatever a session's own severity, for
    each convolution that cuDNN's front end has no plan for, and then runs the convolution in
    another way. What really fails comes as an exception. The logger is the process's own; this is
    done once, after the provider has loaded, so that a severity set later by the caller stays.
    """
    runtime.set_default_logger_severity(_FATAL)


def require_provider(device: Device) -> str:
    """Return the name of a device's provider.

    Raises:
        BackendError: The installed ONNX Runtime was built without it.
    """
    provider = PROVIDERS[device]
    if provider not in _import().get_available_providers():
        raise BackendError(f"the installed ONNX Runtime has no {provider}: {REPLACE_ONNXRUNTIME}")
    return provider


def _specs(tensors: list[onnxruntime.NodeArg]) -> tuple[TensorSpec, ...]:
    for tensor in tensors:
        if tensor.type not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise BackendError(f'"{tensor.name}" is a {tensor.type}; graphs may hold {known}')
    return tuple(TensorSpec(t.name, _DTYPES[t.type], tuple(t.shape)) for t in tensors)


def keep_usage_private() -> None:
    """Let ONNX Runtime report nothing about its use to its makers, unless the user lets it.

    Newer packages do so by default. To be called before it is first imported.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def _import() -> Any:
    try:
        if "onnxruntime" not in sys.modules:
            keep_usage_private()
            with warnings.catch_warnings():  # what matters of them fails when a session opens
                warnings.simplefilter("ignore")
                import onnxruntime
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"ONNX Runtime is not installed: {install('cpu')}, "
            f"or with an NVIDIA GPU {install('gpu')}"
        ) from error
    return onnxruntime


def devices() -> list[Device]:
    """List the devices that the installed ONNX Runtime was built for."""
    built_in = _import().get_available_providers()
    return [device for device, provider in PROVIDERS.items() if provider in built_in]

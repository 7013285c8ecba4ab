"""A GPU through PyCUDA, Numba and cuda.bindings, which all work on its primary context.

PyCUDA keeps a stack of current contexts for each thread, and aborts the process where a thread ends
with a context on it: `CudaDevice.current` makes the primary context current and takes it off again.
PyCUDA's objects would leak if another thread freed them without that context, so the device keeps
them.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ccam_deploy.engines.base import Array
from ccam_deploy.errors import BackendError, brief
from ccam_deploy.extras import install

_INSTALL = install("gpu")
_NVIDIA_PACKAGES = ("cuda.core.", "cuda.bindings.")
_DROPPED_PINNED: list[Any] = []
"""Pinned memory that no array shows any more, until a device frees it. It may outlive its own."""


class _Memory:
    """Describes memory that Numba did not allocate."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "strides": None,
            "typestr": dtype.str,
            "version": 3,
        }


class _Mark:
    """An event that returns to its device's spare events when nobody holds it any more."""

    def __init__(self, event: Any, spare: list[Any]) -> None:
        self.event = event
        self._spare = spare

    def __del__(self) -> None:
        self._spare.append(self.event)


class _Replay:
    """Launches a captured graph, and holds what it was captured from."""

    def __init__(self, executable: Any, stream: Any, held: list[object]) -> None:
        self._executable, self._stream, self._held = executable, stream, held

    def __call__(self) -> None:
        _require_success(_bindings().cuGraphLaunch(self._executable, self._stream))


class CudaDevice:
    """A stream and its memory on the first GPU; see Device."""

    def __init__(self) -> None:
        """Create a stream.

        Raises:
            BackendError: A package, the driver or a GPU is missing.
        """
        self._driver, self._context = _primary_context()
        self._memory: dict[int, Any] = {}
        self._graphs: list[weakref.finalize[..., Any]] = []
        self._dropped_graphs: list[Any] = []
        self._spare_events: list[Any] = []
        self._capturing = False
        self._held: list[object] = []
        self._closed = False
        bindings, numba_cuda = _bindings(), _numba()
        # This stream and the default stream must not wait for each other.
        flags = int(bindings.CUstream_flags.CU_STREAM_NON_BLOCKING)
        with self.current():
            self._stream = self._driver.Stream(flags)
            self.stream = int(self._stream.handle)
            self.kernel_stream = numba_cuda.external_stream(self.stream)

    @contextmanager
    def current(self) -> Iterator[None]:
        """See Device.

        Raises:
            BackendError: The driver or a kernel's launch failed.
        """
        with _BackendErrors():
            self._context.push()
            try:
                yield
            finally:
                self._context.pop()

    @property
    def blocks(self) -> Collection[int]:
        """See Device."""
        return self._memory.keys()

    def allocate(self, size: int) -> int:
        """See Device."""
        with _BackendErrors(f" to allocate {size} bytes"):
            block = self._driver.mem_alloc(max(size, 1))
        self._memory[int(block)] = block
        return int(block)

    def free(self, address: int) -> None:
        """See Device."""
        with _BackendErrors():
            self._stream.synchronize()
            self._memory.pop(address).free()

    def view(self, address: int, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """See Device."""
        with _BackendErrors():
            return _numba().as_cuda_array(_Memory(address, shape, np.dtype(dtype)), sync=False)

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """See Device."""
        _DROPPED_PINNED.clear()
        if not math.prod(shape):
            return np.empty(shape, dtype)
        with _BackendErrors():
            array: NDArray[Any] = self._driver.pagelocked_empty(shape, np.dtype(dtype))
        weakref.finalize(array, _DROPPED_PINNED.append, array.base)
        return array

    def upload(self, address: int, values: Array) -> None:
        """See Device."""
        with _BackendErrors():
            self._driver.memcpy_htod_async(address, values, self._stream)

    def download(self, values: Array, address: int) -> None:
        """See Device."""
        with _BackendErrors():
            self._driver.memcpy_dtoh_async(values, address, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """See Device."""
        with _BackendErrors():
            self._driver.memcpy_dtod_async(target, source, size, self._stream)

    def wait(self, mark: Any = None) -> None:
        """See Device."""
        with _BackendErrors():
            (self._stream if mark is None else mark.event).synchronize()

    def mark(self) -> Any:
        """See Device."""
        with _BackendErrors():
            event = self._spare_events.pop() if self._spare_events else self._driver.Event()
            event.record(self._stream)
        return _Mark(event, self._spare_events)

    def seconds(self, start: Any, end: Any) -> float:
        """See Device."""
        with _BackendErrors():
            return float(end.event.time_since(start.event)) / 1e3

    def hold(self, thing: object) -> None:
        """See Device."""
        if self._capturing:
            self._held.append(thing)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See Device."""
        bindings = _bindings()
        stream = bindings.CUstream(self.stream)
        mode = bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._destroy_dropped_graphs()
        # Memory that Numba would free meanwhile cannot be freed during a capture.
        with _BackendErrors(), _numba().defer_cleanup():
            _require_success(bindings.cuStreamBeginCapture(stream, mode))
            self._capturing, self._held = True, []
            try:
                work()
            except BaseException:
                result, graph = bindings.cuStreamEndCapture(stream)
                if result == bindings.CUresult.CUDA_SUCCESS:
                    bindings.cuGraphDestroy(graph)
                raise
            finally:
                self._capturing = False
            graph = _require_success(bindings.cuStreamEndCapture(stream))
            try:
                executable = _require_success(bindings.cuGraphInstantiate(graph, 0))
            finally:
                _require_success(bindings.cuGraphDestroy(graph))

        replay = _Replay(executable, stream, self._held)
        self._held = []
        self._graphs.append(weakref.finalize(replay, self._dropped_graphs.append, executable))
        return replay

    def close(self) -> None:
        """See Device. Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        with self.current():
            try:
                self._stream.synchronize()
            finally:
                for graph in self._graphs:
                    graph()
                self._destroy_dropped_graphs()
                for block in self._memory.values():
                    block.free()
                self._spare_events.clear()
                _DROPPED_PINNED.clear()
                self._memory.clear()
                del self._stream

    def _destroy_dropped_graphs(self) -> None:
        self._graphs = [graph for graph in self._graphs if graph.alive]
        while self._dropped_graphs:
            _bindings().cuGraphExecDestroy(self._dropped_graphs.pop())


class _BackendErrors:
    """Turns errors of the driver and of kernel launches into BackendError.

    A call enters it dozens of times, and a generator would take three times as long.

    Args:
        action: What was attempted, for the message.
    """

    def __init__(self, action: str = "") -> None:
        self._action = action

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception) and _is_driver_error(error):
            reason = brief(error)
            raise BackendError(
                f"the GPU failed{self._action}: {reason}{_advice(reason)}"
            ) from error


def _is_driver_error(error: Exception) -> bool:
    """Whether PyCUDA, Numba, its compilers or NVIDIA's cuda packages raised an error.

    Numba launches kernels through cuda.core, whose CUDAError has no public name.
    """
    from numba.cuda.cudadrv import error as numba_errors

    driver, _ = _primary_context()
    if isinstance(error, driver.Error) or type(error).__module__ == numba_errors.__name__:
        return True
    return any(base.__module__.startswith(_NVIDIA_PACKAGES) for base in type(error).__mro__)


def _require_success(answer: tuple[Any, ...]) -> Any:
    """Check what a call of cuda.bindings returned.

    Args:
        answer: Its result and its values.

    Returns:
        The first value; None where there is none.

    Raises:
        BackendError: The call failed.
    """
    bindings = _bindings()
    result, *values = answer
    if result != bindings.CUresult.CUDA_SUCCESS:
        _, words = bindings.cuGetErrorString(result)
        reason = words.decode() if words else str(result)
        raise BackendError(f"the GPU failed: {reason}{_advice(reason)}")
    return values[0] if values else None


def _advice(words: str) -> str:
    if "memory" in words and "out of" in words:
        return "; use a smaller batch_size or k_max"
    return "; if this happens again, restart the process: its CUDA context may be lost"


@cache
def _primary_context() -> tuple[Any, Any]:
    """PyCUDA's driver module, and the first GPU's primary context, for the whole process.

    All threads share it, because PyCUDA frees an object only under the context object that it was
    created under.
    """
    try:
        with warnings.catch_warnings():  # it warns before it fails: the error says it
            warnings.simplefilter("ignore")
            import pycuda.driver as driver
    except ImportError as error:
        raise BackendError(f"PyCUDA cannot be loaded ({brief(error)}): {_INSTALL}") from error
    try:
        driver.init()
        return driver, driver.Device(0).retain_primary_context()
    except driver.Error as error:
        raise BackendError(f"no NVIDIA GPU can be used: {brief(error)}") from error


@cache
def _bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendError(f"cuda.bindings is missing ({brief(error)}): {_INSTALL}") from error
    return driver


@cache
def _numba() -> Any:
    try:
        with warnings.catch_warnings():  # of how the process loads libraries, or of Numba's files
            warnings.simplefilter("ignore")
            from numba import cuda
            from numba.cuda import dispatcher
            from numba.cuda.cudadrv.error import NvvmWarning
    except ImportError as error:
        raise BackendError(f"numba-cuda cannot be loaded ({brief(error)}): {_INSTALL}") from error
    # One image is a small grid; a warning about each would say nothing new.
    dispatcher.config.CUDA_LOW_OCCUPANCY_WARNINGS = 0
    # Notes of the compiler on Numba's own code.
    warnings.filterwarnings("ignore", category=NvvmWarning)
    return cuda

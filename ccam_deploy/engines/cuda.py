"""A GPU through PyCUDA, Numba and cuda.bindings, which all work on its primary context.

PyCUDA counts, thread by thread, which context is current, and aborts the process where a thread
ends with one. So each method makes the primary context current and gives it back. What PyCUDA
made is freed in `CudaDevice.close` alone, where that context is current: elsewhere it would leak.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ccam_deploy.engines.base import Array
from ccam_deploy.engines.device import ALIGNMENT
from ccam_deploy.errors import BackendError, brief

_BLOCK = 32 << 20
_INSTALL = "pip install 'ccam-deploy[gpu]'"


class Arena:
    """Hands out pieces of a few large blocks of memory; they are freed all at once.

    allocate: the address of so many new bytes.
    """

    def __init__(self, allocate: Callable[[int], int], block: int = _BLOCK) -> None:
        self._allocate = allocate
        self._block = block
        self._next = 0
        self._end = 0

    def take(self, size: int) -> int:
        """The address of `size` bytes, on a multiple of ALIGNMENT."""
        size = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
        if size > self._block:
            return self._allocate(size)
        if self._next + size > self._end:
            self._next = self._allocate(self._block)
            self._end = self._next + self._block
        address = self._next
        self._next += size
        return address


class _Memory:
    """What Numba needs to know of memory that is not its own."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "strides": None,
            "typestr": dtype.str,
            "version": 3,
        }


class _Mark:
    """An event that goes back to its device's spare ones when nobody holds it any more."""

    def __init__(self, event: Any, spare: list[Any]) -> None:
        self.event = event
        weakref.finalize(self, spare.append, event)


class CudaDevice:
    """The first GPU, with a stream and memory of one's own; see Device.

    Arrays from `pinned` are not to be used after `close`.
    Raises BackendError where a package, the driver or a GPU is missing.
    """

    def __init__(self) -> None:
        self._driver, self._context = _primary_context()
        self._graphs: list[Any] = []
        self._blocks: list[Any] = []
        self._pinned: list[Any] = []
        self._spare: list[Any] = []
        self._arena = Arena(self._new_block)
        self._closed = False
        bindings, numba_cuda = _bindings(), _numba()
        # Work on the default stream must not wait for this one, nor this one for it.
        flags = int(bindings.CUstream_flags.CU_STREAM_NON_BLOCKING)
        with self._current():
            self._stream = self._driver.Stream(flags)
            self.stream = int(self._stream.handle)
            self.kernel_stream = numba_cuda.external_stream(self.stream)

    def allocate(self, size: int) -> int:
        """See Device."""
        return self._arena.take(size)

    def view(self, address: int, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """See Device."""
        with self._current():
            return _numba().as_cuda_array(_Memory(address, shape, np.dtype(dtype)), sync=False)

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """See Device."""
        with self._current():
            array: NDArray[Any] = self._driver.pagelocked_empty(shape, np.dtype(dtype))
            self._pinned.append(array)
            return array

    def upload(self, address: int, values: Array) -> None:
        """See Device."""
        with self._current():
            self._driver.memcpy_htod_async(address, values, self._stream)

    def download(self, values: Array, address: int) -> None:
        """See Device."""
        with self._current():
            self._driver.memcpy_dtoh_async(values, address, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """See Device."""
        with self._current():
            self._driver.memcpy_dtod_async(target, source, size, self._stream)

    def wait(self) -> None:
        """See Device."""
        with self._current():
            self._stream.synchronize()

    def mark(self) -> Any:
        """See Device."""
        with self._current():
            event = self._spare.pop() if self._spare else self._driver.Event()
            event.record(self._stream)
            return _Mark(event, self._spare)

    def seconds(self, start: Any, end: Any) -> float:
        """See Device."""
        with self._current():
            return float(end.event.time_since(start.event)) / 1e3

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See Device."""
        bindings = _bindings()
        stream = bindings.CUstream(self.stream)
        mode = bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        # Memory that Numba would free meanwhile cannot be freed during a capture.
        with self._current(), _numba().defer_cleanup():
            _check(bindings.cuStreamBeginCapture(stream, mode))
            try:
                work()
            except BaseException:
                result, graph = bindings.cuStreamEndCapture(stream)
                if result == bindings.CUresult.CUDA_SUCCESS:
                    bindings.cuGraphDestroy(graph)
                raise
            graph = _check(bindings.cuStreamEndCapture(stream))
            try:
                executable = _check(bindings.cuGraphInstantiate(graph, 0))
            finally:
                _check(bindings.cuGraphDestroy(graph))
        self._graphs.append(executable)

        def replay() -> None:
            with self._current():
                _check(bindings.cuGraphLaunch(executable, stream))

        return replay

    def close(self) -> None:
        """See Device. Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        bindings = _bindings()
        with self._current():
            try:
                self._stream.synchronize()
            finally:
                for graph in self._graphs:
                    bindings.cuGraphExecDestroy(graph)
                for block in self._blocks:
                    block.free()
                for held in (self._graphs, self._blocks, self._pinned, self._spare):
                    held.clear()
                del self._stream

    def _new_block(self, size: int) -> int:
        with self._current():
            block = self._driver.mem_alloc(size)
            self._blocks.append(block)
            return int(block)

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Make the context current in this thread; raise BackendError for the driver's errors."""
        try:
            self._context.push()
            try:
                yield
            finally:
                self._context.pop()
        except _driver_errors() as error:
            raise BackendError(f"the GPU failed: {brief(error)}") from error


def _check(answer: tuple[Any, ...]) -> Any:
    """What a call of cuda.bindings gave. Raises BackendError where it failed."""
    bindings = _bindings()
    result, *values = answer
    if result != bindings.CUresult.CUDA_SUCCESS:
        _, words = bindings.cuGetErrorString(result)
        reason = words.decode() if words else str(result)
        raise BackendError(f"the GPU failed: {reason}")
    return values[0] if values else None


@cache
def _primary_context() -> tuple[Any, Any]:
    """PyCUDA's driver module, and the first GPU's primary context, for the whole process.

    One object for all threads: PyCUDA frees what was made under it where that same object is
    current.
    """
    try:
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
        from numba import cuda
        from numba.cuda import dispatcher
    except ImportError as error:
        raise BackendError(f"numba-cuda cannot be loaded ({brief(error)}): {_INSTALL}") from error
    # One image is a small grid; a warning about each would say nothing new.
    dispatcher.config.CUDA_LOW_OCCUPANCY_WARNINGS = 0
    return cuda


def _driver_errors() -> tuple[type[Exception], ...]:
    from numba.cuda.cudadrv.error import CudaDriverError

    driver, _ = _primary_context()
    return driver.Error, CudaDriverError

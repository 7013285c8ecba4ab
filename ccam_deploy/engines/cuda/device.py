"""A GPU's memory and one of its streams, as engines and kernels share them.

PyCUDA attaches to the primary context, the only one that Numba knows, and owns the memory, the
stream and the events. Engines take the stream's handle and addresses; Numba's kernels take the
same stream and memory wrapped. CUDA graphs are captured with cuda.bindings on that stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ccam_deploy.engines.base import Array, TensorSpec

ALIGNMENT = 256


@dataclass(frozen=True)
class DeviceTensor:
    """A tensor in device memory, without gaps.

    Attributes:
        address: Where it starts.
        shape: Its shape.
        dtype: Its type.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        """How much memory it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, count: int, start: int = 0) -> DeviceTensor:
        """Some of its rows, along the first axis."""
        row = self.bytes // self.shape[0]
        return DeviceTensor(self.address + start * row, (count, *self.shape[1:]), self.dtype)

    def words(self) -> DeviceTensor:
        """The same memory, each row in the widest words that it is a whole number of."""
        row = self.bytes // self.shape[0]
        width = next(size for size in (8, 4, 2, 1) if row % size == 0)
        return DeviceTensor(self.address, (self.shape[0], row // width), np.dtype(f"u{width}"))


class DeviceGraph(Protocol):
    """A graph, ready to run on tensors in device memory, always on the same device's stream.

    The first launch for each set of shapes may take long, and wait. Only one thread at a time may
    use a graph.

    Attributes:
        inputs: In order; a shape has names for the axes that vary, "batch" and "masks".
        outputs: The same.
        limits: The largest size of axes that vary, by name; others have no limit.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    limits: Mapping[str, int]

    @property
    def replays_itself(self) -> bool:
        """Whether it keeps CUDA graphs of its own, which cannot be part of another."""
        ...

    @property
    def capturable(self) -> bool:
        """Whether a later launch for the same shapes may be captured in a CUDA graph."""
        ...

    def bind(self, tensors: Mapping[str, DeviceTensor]) -> Callable[[], None]:
        """Prepare to run often on the same tensors, at the lowest cost for each run.

        Args:
            tensors: Every input and output by name.

        Returns:
            A function that does what `launch` does with them.

        Raises:
            BackendError: The engine refuses.
        """
        ...

    def launch(self, tensors: Mapping[str, DeviceTensor]) -> None:
        """Put a run on the stream, and return without waiting for it.

        Args:
            tensors: Every input and output by name.

        Raises:
            BackendError: The engine refuses.
        """
        ...

    def close(self) -> None:
        """Free the graph's memory."""
        ...


class Device(Protocol):
    """A stream and its memory; work on the stream is done in order."""

    @property
    def stream(self) -> int:
        """The stream's handle, for engines."""
        ...

    @property
    def kernel_stream(self) -> Any:
        """The stream for Numba's kernels."""
        ...

    @property
    def blocks(self) -> Collection[int]:
        """The addresses of what is allocated."""
        ...

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes on a multiple of ALIGNMENT, until `free` or `close`.

        Returns:
            Their address.

        Raises:
            BackendError: There is too little memory.
        """
        ...

    def free(self, address: int) -> None:
        """Free memory from `allocate`, once the stream's work is done."""
        ...

    def current(self) -> AbstractContextManager[None]:
        """Make the device current in the calling thread, as all other calls require."""
        ...

    def view(self, address: int, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """Device memory as an array for Numba's kernels."""
        ...

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A page-locked host array, for fast copies to and from the device; it may outlive that."""
        ...

    def upload(self, address: int, values: Array) -> None:
        """Put a copy of a host array, without gaps, to the device on the stream."""
        ...

    def download(self, values: Array, address: int) -> None:
        """Put a copy from the device into a host array, without gaps, on the stream."""
        ...

    def copy(self, target: int, source: int, size: int) -> None:
        """Put a copy within the device on the stream."""
        ...

    def wait(self, mark: Any = None) -> None:
        """Wait until the stream's work is done, or that before a mark.

        Args:
            mark: An event from `mark`; None for all work.

        Raises:
            BackendError: Some of it failed.
        """
        ...

    def mark(self) -> Any:
        """An event: the moment when the work put on the stream so far is done."""
        ...

    def seconds(self, start: Any, end: Any) -> float:
        """The time between two events, both in the past."""
        ...

    def hold(self, thing: object) -> None:
        """Keep an object as long as the graph that is being captured; do nothing where none is."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture what `work` puts on the stream.

        Args:
            work: Allocates no memory and compiles no kernel.

        Returns:
            A function that puts the same on the stream again.

        Raises:
            BackendError: It cannot be captured.
        """
        ...

    def close(self) -> None:
        """Wait, and free memory and stream."""
        ...


class Region:
    """Named arrays one after the other in device memory, with a mirror on the host if asked for.

    Attributes:
        tensors: The arrays on the device.
        host: Their mirror in pinned memory.
        address: Where they start.
        size: How many bytes they take, gaps included.
    """

    def __init__(
        self,
        device: Device,
        arrays: Mapping[str, tuple[tuple[int, ...], DTypeLike]],
        mirrored: bool = False,
    ) -> None:
        """Allocate the arrays.

        Args:
            device: Whose memory to take.
            arrays: Shape and type by name.
            mirrored: Whether the host gets a mirror.

        Raises:
            BackendError: There is too little memory.
        """
        self._device = device
        places, size = [], 0
        for shape, dtype in arrays.values():
            places.append(size)
            size += -(-math.prod(shape) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT
        self.size = size
        self.address = device.allocate(size)
        self.tensors = {
            name: DeviceTensor(self.address + place, shape, np.dtype(dtype))
            for (name, (shape, dtype)), place in zip(arrays.items(), places, strict=True)
        }
        self._mirror = device.pinned((size if mirrored else 0,), np.uint8)
        self.host = self.arrays(self._mirror) if mirrored else {}

    def arrays(self, memory: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """The arrays by name, as views of `size` bytes of host memory that mirror them."""
        return {
            name: np.ndarray(tensor.shape, tensor.dtype, memory, tensor.address - self.address)
            for name, tensor in self.tensors.items()
        }

    def view(self, name: str) -> Any:
        """One of the arrays for Numba's kernels."""
        tensor = self.tensors[name]
        return self._device.view(tensor.address, tensor.shape, tensor.dtype)

    def upload(self) -> None:
        """Put a copy of the whole mirror to the device on the stream."""
        self._device.upload(self.address, self._mirror)

    def download(self, memory: NDArray[np.uint8] | None = None) -> None:
        """Put a copy of all arrays on the stream: to `size` bytes of host memory, or the mirror."""
        self._device.download(self._mirror if memory is None else memory, self.address)

    def close(self) -> None:
        """Free the device memory."""
        self._device.free(self.address)

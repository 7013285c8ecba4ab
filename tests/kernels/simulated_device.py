"""The CUDA kernels on Numba's simulator, in a process of its own.

The simulator is chosen by an environment variable before Numba is imported, for a whole process.
It knows no warps: their shuffles and votes are added here. So is a scheduler that switches between
a block's threads as greenlets, and finds out when they wait for others that never come; the
simulator's own polls threads of the operating system and is many times slower.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from greenlet import getcurrent, greenlet
from numpy.typing import NDArray

from ccam_deploy.arrays import Floats
from ccam_deploy.kernels.cuda.buffers import Buffers, Spec
from ccam_deploy.kernels.cuda.geometry import BLOCK_CLUSTERS, Geometry, LayerPlace

if TYPE_CHECKING:
    from ccam_deploy.kernels.cuda.launch import CollectionKernels

WARP = 32
Stages = tuple[str, ...]
Arrays = dict[str, NDArray[Any]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Run:
    """What to launch.

    shapes: each layer's C, h, w.   stages: methods of CollectionKernels, in order.
    features, gradients: per layer [images, C, h, w] and [pairs, C, h, w].
    logits: [images, classes], or [rows, classes] of masked images.   codes: [pairs].
    room_for_k: the most collections that the buffers have room for; 0 for k_max.
    given: contents of buffers before the first stage.   threads: per block, for every kernel.
    block_clusters, block_pixels: see Geometry.
    """

    shapes: tuple[tuple[int, int, int], ...]
    stages: Stages
    owner: tuple[int, ...] = (0,)
    features: tuple[NDArray[Any], ...] = ()
    gradients: tuple[NDArray[Any], ...] = ()
    logits: NDArray[Any] | None = None
    codes: tuple[int, ...] = ()
    scoring: str = "logit"
    given: Arrays = field(default_factory=dict)
    size: tuple[int, int] = (8, 8)
    k_min: int = 2
    k_max: int = 4
    room_for_k: int = 0
    theta: float = 0.1
    gradient_scale: float = 1.0
    mask_dtype: str = "float32"
    standardise: bool = False
    block_clusters: int = BLOCK_CLUSTERS
    block_pixels: int = 1 << 13
    threads: int = 64

    def geometry(self) -> Geometry:
        places, feature, gradient = [], 3, 1
        for channels, height, width in self.shapes:
            places.append(LayerPlace(channels, height, width, feature, gradient))
            feature += (max(self.owner) + 1) * channels * height * width + 5
            gradient += len(self.owner) * channels * height * width
        return Geometry(
            tuple(places),
            self.size,
            len(self.owner) + 1,
            self.room_for_k or self.k_max,
            self.theta,
            self.mask_dtype,
            self.block_clusters,
            self.block_pixels,
        )


class Device:
    """Runs kernels in the simulator's process, or, without one, on the GPU."""

    def __init__(self, pool: Executor | None) -> None:
        self.pool = pool

    def __call__(self, run: Run) -> Arrays:
        return self._call(simulate, run)

    def cast(self, values: Floats, dtype: str, threads: int) -> NDArray[np.generic]:
        return self._call(simulate_cast, values, dtype, threads)

    def gather(self, values: NDArray[Any], owner: tuple[int, ...], threads: int) -> NDArray[Any]:
        return self._call(simulate_gather, values, owner, threads)

    def _call(self, function: Callable[..., Result], *arguments: object) -> Result:
        if self.pool is None:
            return function(*arguments)
        return self.pool.submit(function, *arguments).result()


def split(run: Run, values: NDArray[np.generic]) -> list[NDArray[np.generic]]:
    """Each layer's part of an array whose second axis is all layers' channels."""
    ends = np.cumsum([channels for channels, _, _ in run.shapes])
    return np.split(values[: len(run.owner)], ends[:-1], axis=1)


def simulate(run: Run) -> Arrays:
    """Run the stages on the device that this process has: a GPU, or Numba's simulator."""
    from numba import cuda

    from ccam_deploy.kernels.cuda.launch import Head, Inputs

    kernels = _kernels(run)
    layers = kernels.geometry.layers
    inputs = Inputs(
        cuda.to_device(_arena(run.features, [layer.features for layer in layers])),
        cuda.to_device(_arena(run.gradients, [layer.gradients for layer in layers])),
        cuda.to_device(np.array(run.owner, np.int32)),
        cuda.to_device(np.array([run.k_min, run.k_max], np.int32)),
    )
    logits = np.zeros((1, 1), np.float32) if run.logits is None else run.logits
    head = Head(
        cuda.to_device(logits),
        cuda.to_device(np.array(run.codes, np.int32)),
        cuda.to_device(np.full((len(run.owner), logits.shape[1]), np.nan, logits.dtype)),
    )
    stream = cuda.stream()
    extra: dict[str, tuple[Any, ...]] = {
        "output_gradient": (head, run.gradient_scale, run.scoring),
        "statistics": (run.gradient_scale,),
        "partition": (run.standardise,),
        "scores": (head.logits, run.scoring),
    }
    for stage in run.stages:
        getattr(kernels, stage)(inputs, *extra.get(stage, ()), stream)
    stream.synchronize()
    tried, partitioned = run.k_max - run.k_min + 1, "partition" in run.stages
    arrays = {name: array.copy_to_host() for name, array in kernels.buffers.by_name().items()}
    assert (arrays["quality"][: len(run.owner), :, tried:] == -1).all() or not partitioned
    arrays["quality"] = arrays["quality"][:, :, :tried]
    return arrays | {"gradient": head.gradient.copy_to_host()}


def simulate_gather(values: NDArray[Any], owner: tuple[int, ...], threads: int) -> NDArray[Any]:
    """The rows of the pairs' images, as a kernel in this process copies them."""
    from numba import cuda

    from ccam_deploy.kernels.cuda.launch import Inputs

    kernels = _kernels(Run(((1, 1, 1),), (), threads=threads))
    target = cuda.to_device(np.zeros((len(owner), values.shape[1]), values.dtype))
    nothing = cuda.to_device(np.zeros(1, np.float32))
    k_range = cuda.to_device(np.array([2, 4], np.int32))
    inputs = Inputs(nothing, nothing, cuda.to_device(np.array(owner, np.int32)), k_range)
    stream = cuda.stream()
    kernels.gather(inputs, cuda.to_device(values), target, stream)
    stream.synchronize()
    return target.copy_to_host()  # type: ignore[no-any-return]


def simulate_cast(values: NDArray[Any], dtype: str, threads: int) -> NDArray[Any]:
    """The same values in another type, as a kernel in this process casts them."""
    from numba import cuda

    kernels = _kernels(Run(((1, 1, 1),), (), threads=threads))
    target, stream = cuda.to_device(np.full(values.shape, np.nan, dtype)), cuda.stream()
    kernels.cast(cuda.to_device(values), target, stream)
    stream.synchronize()
    return target.copy_to_host()  # type: ignore[no-any-return]


def _kernels(run: Run) -> CollectionKernels:
    from numba import cuda

    from ccam_deploy.kernels.cuda.launch import CollectionKernels, Threads, write_constants

    def allocate(spec: Spec) -> Any:
        filler = 77 if np.issubdtype(spec.dtype, np.integer) else np.nan
        return cuda.to_device(np.full(spec.shape, filler, spec.dtype))

    geometry = run.geometry()
    specs = geometry.specs().by_name()
    buffers = Buffers.of({name: allocate(spec) for name, spec in specs.items()})
    write_constants(geometry, buffers, cuda.stream())
    given = dict(run.given)
    if "output_gradient" not in run.stages:
        given.setdefault("slopes", np.ones(geometry.pairs, np.float32))
    for name, values in given.items():
        target = getattr(buffers, name)
        target[tuple(slice(n) for n in values.shape)] = values.astype(target.dtype)
    return CollectionKernels(geometry, buffers, Threads(*[run.threads] * len(fields(Threads))))


def _arena(layers: tuple[NDArray[Any], ...], starts: list[int]) -> NDArray[Any]:
    if not layers:
        return np.zeros(1, np.float32)
    arena = np.full(starts[-1] + layers[-1].size, np.nan, layers[0].dtype)
    for start, values in zip(starts, layers, strict=True):
        arena[start : start + values.size] = values.reshape(-1)
    return arena


@contextmanager
def simulator() -> Iterator[ProcessPoolExecutor]:
    """A process in which `simulate` works."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _begin) as pool:
        yield pool


def _begin() -> None:
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
    from numba.cuda.simulator import kernel, kernelapi

    kernel.swapped_cuda_module = _put_cuda_module
    kernel.FakeWithinKernelCUDAArray = lambda array: array._ary
    kernelapi.threading = SimpleNamespace(current_thread=getcurrent)
    kernelapi.FakeCUDAShared.array = _shared_array
    kernel.BlockManager.run = _run_block
    for name in ("shfl_sync", "shfl_up_sync", "shfl_xor_sync", "ballot_sync"):
        setattr(kernelapi.FakeCUDAModule, name, globals()[f"_{name}"])
    # Modules cannot declare kernels once another module's have run, which changed their `cuda`.
    for module in ("launch", "row_launch", "gradient_launch"):
        import_module(f"ccam_deploy.kernels.cuda.{module}")


def _put_cuda_module(function: Any, module: Any) -> AbstractContextManager[None]:
    """Let a kernel's code see the simulated `cuda`; nothing else in this process needs another."""
    function.__globals__["cuda"] = module
    return nullcontext()


def _shared_array(shared: Any, shape: Any, dtype: Any) -> NDArray[Any]:
    """The block's array for this line of code, without reading the source as Numba's own does."""
    frame = sys._getframe(1)
    place = frame.f_code.co_filename, frame.f_lineno
    if place not in shared._allocations:
        shared._allocations[place] = np.zeros(shape, dtype)
    return shared._allocations[place]  # type: ignore[no-any-return]


def _run_block(block: Any, block_index: tuple[int, ...], *args: Any) -> None:
    _Block(partial(block._f, *args), block_index, block._block_dim).run()


class _Thread(greenlet):
    """A CUDA thread, with what kernels ask of it."""

    def __init__(self, block: _Block, block_index: Any, thread_index: Any, number: int) -> None:
        super().__init__(block.work)
        self.block = block
        self.blockIdx = block_index
        self.threadIdx = thread_index
        self.thread_id = number

    def syncthreads(self) -> None:
        self.block.barrier.wait(self)

    def syncthreads_and(self, value: Any) -> int:
        return int(all(self.block.barrier.exchange(self, self.thread_id, value)))

    def syncthreads_or(self, value: Any) -> int:
        return int(any(self.block.barrier.exchange(self, self.thread_id, value)))


class _Barrier:
    """Threads of a block or warp that wait for each other, and what they show each other then.

    Two sets of values, so that threads need not wait again before they show the next.
    """

    def __init__(self, size: int, ready: deque[_Thread]) -> None:
        self.size = size
        self.ready = ready
        self.scheduler = getcurrent()
        self.waiting: list[_Thread] = []
        self.shown: list[list[Any]] = [[None] * size, [None] * size]
        self.turn = [0] * size

    def wait(self, thread: _Thread) -> None:
        """Let other threads run until all have come here."""
        self.waiting.append(thread)
        if len(self.waiting) == self.size:
            self.ready.extend(self.waiting)
            self.waiting.clear()
        self.scheduler.switch()

    def exchange(self, thread: _Thread, number: int, value: Any) -> list[Any]:
        """The values of all threads, by their number here."""
        shown = self.shown[self.turn[number]]
        self.turn[number] ^= 1
        shown[number] = value
        self.wait(thread)
        return shown


class _Block:
    """Runs a block's threads in turn, each until it has to wait for others."""

    def __init__(
        self, work: Callable[[], None], index: tuple[int, ...], shape: tuple[int, ...]
    ) -> None:
        from numba.cuda.simulator.kernelapi import Dim3

        self.work = work
        block_index = Dim3(*index)
        places = sorted(np.ndindex(*shape), key=lambda place: place[::-1])
        threads = [
            _Thread(self, block_index, Dim3(*place), number) for number, place in enumerate(places)
        ]
        self.ready = deque(threads)
        self.barrier = _Barrier(len(threads), self.ready)
        self.warps = [_Barrier(WARP, self.ready) for _ in range(len(threads) // WARP)]

    def run(self) -> None:
        """Run until every thread ended.

        Raises:
            RuntimeError: Threads wait for others that ended or wait elsewhere.
        """
        while self.ready:
            self.ready.popleft().switch()
        if self.barrier.waiting or any(warp.waiting for warp in self.warps):
            raise RuntimeError("some threads of the block wait for others that will not come")


def _exchange(value: Any) -> tuple[int, list[Any]]:
    """This thread's lane, and the values of its warp's lanes."""
    thread: Any = getcurrent()
    number, lane = divmod(thread.thread_id, WARP)
    return lane, thread.block.warps[number].exchange(thread, lane, value)


def _shfl_sync(module: Any, mask: int, value: Any, source: int) -> Any:
    return _exchange(value)[1][source % WARP]


def _shfl_up_sync(module: Any, mask: int, value: Any, delta: int) -> Any:
    lane, shown = _exchange(value)
    return shown[lane - delta] if lane >= delta else value


def _shfl_xor_sync(module: Any, mask: int, value: Any, change: int) -> Any:
    lane, shown = _exchange(value)
    return shown[lane ^ change]


def _ballot_sync(module: Any, mask: int, predicate: Any) -> int:
    _, shown = _exchange(bool(predicate))
    return sum(1 << lane for lane, value in enumerate(shown) if value)

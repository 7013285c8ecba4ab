"""The device pipeline without a GPU: numpy memory, Numba's simulator, ONNX Runtime on the CPU."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

import ccam_deploy as ccam
from ccam_deploy.bundle.folder import read_bundle
from ccam_deploy.engines import Networks, load_networks
from ccam_deploy.engines.cuda.device import ALIGNMENT, DeviceTensor
from ccam_deploy.engines.cuda.graph_replay import CudaGraphs
from ccam_deploy.engines.cuda.slots import Slot, Slots
from ccam_deploy.engines.onnxruntime import OnnxRuntimeGraph
from ccam_deploy.errors import BackendError, CcamError
from ccam_deploy.methods import CollectionCAM, Method

Array = NDArray[Any]
Launch = tuple[str, int]
_THREADS = 32
_GARBAGE = 0xFF
"""NaN in every float, -1 in every integer: what was not written must not be read."""


class HostDevice:
    """A Device whose memory is the host's; kernels run in Numba's simulator, at once.

    allocations: how many times memory was allocated.   captured: how many times work was captured.
    replayed: how many times captured work was launched.   pinned_arrays: what `pinned` returned.
    """

    stream = 0

    def __init__(self, captures: bool = True) -> None:
        self.allocations = 0
        self.captured = 0
        self.replayed = 0
        self.blocks: dict[int, Array] = {}
        self.pinned_arrays: list[Array] = []
        self._captures = captures

    @property
    def kernel_stream(self) -> Any:
        from numba import cuda

        return cuda.stream()

    def allocate(self, size: int) -> int:
        self.allocations += 1
        block = np.full(size + ALIGNMENT, _GARBAGE, np.uint8)
        address = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.blocks[address] = block
        return address

    def free(self, address: int) -> None:
        del self.blocks[address]

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def view(self, address: int, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return FakeCUDAArray(self._bytes(address, size).view(dtype).reshape(shape))

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        self.pinned_arrays.append(np.empty(shape, dtype))
        return self.pinned_arrays[-1]

    def upload(self, address: int, values: Array) -> None:
        self._bytes(address, values.nbytes)[:] = values.reshape(-1).view(np.uint8)

    def download(self, values: Array, address: int) -> None:
        values.reshape(-1).view(np.uint8)[:] = self._bytes(address, values.nbytes)

    def copy(self, target: int, source: int, size: int) -> None:
        self._bytes(target, size)[:] = self._bytes(source, size)

    def wait(self, mark: float | None = None) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def hold(self, thing: object) -> None:
        pass

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        if not self._captures:
            raise BackendError("this device captures nothing")
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay

    def close(self) -> None:
        self.blocks.clear()

    def _bytes(self, address: int, size: int) -> Array:
        for start, block in self.blocks.items():
            offset = address - block.ctypes.data
            if start <= address and offset + size <= len(block):
                return block[offset : offset + size]
        raise AssertionError(f"{size} bytes at {address} are not in the device's memory")


@dataclass
class Record:
    """What graphs did.

    launches: each launch's graph and rows.   bound: how often each graph was bound, by its name,
    rows and addresses.
    """

    launches: list[Launch] = field(default_factory=list)
    bound: Counter[Any] = field(default_factory=Counter)

    def take(self) -> list[Launch]:
        """The launches since the last call."""
        launches, self.launches = self.launches, []
        return launches


class RecordedGraph(OnnxRuntimeGraph):
    """A graph on ONNX Runtime where the device's memory is, the host's."""

    def __init__(self, name: str, path: Path, record: Record) -> None:
        super().__init__(path, "cpu", 0)
        self.name = name
        self.record = record

    def bind(self, tensors: Mapping[str, DeviceTensor]) -> Callable[[], None]:
        addresses = tuple(tensor.address for tensor in tensors.values())
        self.record.bound[self.name, self._rows(tensors), addresses] += 1
        run = super().bind(tensors)

        def launch() -> None:
            self.record.launches.append((self.name, self._rows(tensors)))
            run()

        return launch

    def launch(self, tensors: Mapping[str, DeviceTensor]) -> None:
        self.record.launches.append((self.name, self._rows(tensors)))
        super().launch(tensors)

    def _rows(self, tensors: Mapping[str, DeviceTensor]) -> int:
        return next(tensors[n].shape[0] for n in ("logits", "gradient_0") if n in tensors)


def slot_on(
    device: HostDevice,
    paths: Mapping[str, Path],
    limits: Mapping[str, int],
    record: Record,
    replays_itself: bool = False,
) -> Slot:
    """A slot whose graphs run on ONNX Runtime where the device's memory is."""
    graphs = {name: RecordedGraph(name, path, record) for name, path in paths.items()}
    for graph in graphs.values():
        graph.capturable = not replays_itself
        graph.replays_itself = replays_itself
        graph.limits = limits
    return Slot(device, {"latency": graphs, "throughput": graphs})


@dataclass(frozen=True)
class Call:
    """One call of an explainer. images: [B, C, H, W] float32."""

    images: Array
    targets: Any = None
    method: Method = field(default_factory=CollectionCAM)
    budget_ms: float | None = None


@dataclass(frozen=True)
class Job:
    """What to run in the simulator's process: the calls of one explainer, one after the other.

    passes: how often to run the passes of the first call alone, in the end.
    replays_itself: whether engines keep CUDA graphs of their own.   warm_up: the most images that
    the explainer is prepared for before the first call; 0 for none.
    """

    bundle: Path
    calls: tuple[Call, ...]
    precision: str = "fp32"
    batch_size: int = 4
    masks: int = 64
    cuda_graphs: CudaGraphs = True
    captures: bool = True
    passes: int = 0
    replays_itself: bool = False
    warm_up: int = 0


@dataclass(frozen=True)
class Report:
    """What came of a job.

    allocations, bound, captures: how many there had been before the first call, and after each.
    launches: each graph's name and rows, of each call.   passes: the same of the passes alone.
    progress: what the warm-up said.
    """

    results: list[ccam.Explanation]
    allocations: list[int]
    bound: list[int]
    captures: list[int]
    launches: list[list[Launch]]
    passes: list[Launch]
    progress: list[str]
    notes: tuple[str, ...]
    captured: int
    replayed: int


@contextmanager
def opened(job: Job) -> Iterator[tuple[ccam.Explainer, list[HostDevice], Record]]:
    """An explainer on slots of a device that is played, in a process started by `simulator`."""
    from ccam_deploy.kernels.cuda import launch

    # The simulator takes a while for every thread.
    launch.Threads.__init__.__defaults__ = (_THREADS,) * len(fields(launch.Threads))
    bundle = read_bundle(job.bundle)
    chosen = bundle.precision(job.precision)
    paths = {name: bundle.path(file) for name, file in chosen.graphs.items()}
    devices: list[HostDevice] = []
    record = Record()
    graphs: list[weakref.ref[Any]] = []

    def open_slot() -> Slot:
        devices.append(HostDevice(job.captures))
        limits = {"batch": 8, "masks": job.masks}
        slot = slot_on(devices[-1], paths, limits, record, job.replays_itself)
        graphs.extend(weakref.ref(graph) for graph in slot.graphs["latency"].values())
        return slot

    host = load_networks(paths, chosen.gradient_scale, "onnxruntime-cpu")
    networks = Networks(host.engines, chosen.gradient_scale, "host", Slots(open_slot, 1))
    with ccam.Explainer(
        bundle, networks, job.precision, job.batch_size, job.cuda_graphs
    ) as explainer:
        yield explainer, devices, record
    assert not any(device.blocks for device in devices)
    del host, networks, explainer
    assert not any(graph() for graph in graphs), "graphs are freed with the explainer, not later"


def pinned_results(job: Job, kept: bool) -> list[tuple[bool, int]]:
    """Of each call, whether its maps lie in pinned memory, and how often memory was pinned so far.

    In a process started by `simulator`. kept: whether all results are held until the last call.
    """
    told, results = [], []
    with opened(job) as (explainer, devices, _):
        for call in job.calls:
            result = explainer.explain(call.images, call.targets, method=call.method)
            pinned = [array for device in devices for array in device.pinned_arrays]
            shared = [
                any(np.shares_memory(maps, array) for array in pinned)
                for maps in (result.saliency, result.raw_saliency, result.layers[0].labels)
            ]
            assert len(set(shared)) == 1
            told.append((shared[0], len(pinned)))
            results.append(result)
            if not kept:
                results.clear()
                del result
    return told


def after_an_interrupt(job: Job) -> list[ccam.Explanation]:
    """The first call's result, before and after one that is interrupted between two kernels.

    In a process started by `simulator`. What kernels leave for those after them stays there.
    """
    from ccam_deploy.kernels.cuda.launch import CollectionKernels

    whole, call = CollectionKernels.masks, job.calls[0]

    def interrupted(kernels: CollectionKernels, inputs: Any, stream: Any) -> None:
        whole(kernels, inputs, stream)
        for left in (kernels.buffers.histograms, kernels.buffers.finished):
            left.copy_to_device(np.full(left.shape, 3, left.dtype), stream)
        raise KeyboardInterrupt

    with opened(job) as (explainer, _, _):
        before = explainer.explain(call.images, call.targets, method=call.method)
        CollectionKernels.masks = interrupted  # type: ignore[assignment, method-assign]
        try:
            explainer.explain(call.images, call.targets, method=call.method)
            raise AssertionError("the call was not interrupted")
        except KeyboardInterrupt:
            pass
        finally:
            CollectionKernels.masks = whole  # type: ignore[method-assign]
        return [before, explainer.explain(call.images, call.targets, method=call.method)]


def k_max_refused(job: Job) -> list[str]:
    """What is said of each call, "" where nothing is; in a process started by `simulator`."""
    told = []
    with opened(job) as (explainer, _, _):
        for call in job.calls:
            try:
                explainer.explain(call.images, call.targets, method=call.method)
                told.append("")
            except CcamError as error:
                told.append(str(error))
    return told


def run(job: Job) -> Report:
    """Run a job in this process, which must have been started by `simulator`."""
    with opened(job) as (explainer, devices, record):

        def counts() -> tuple[int, int, int]:
            allocations = sum(device.allocations for device in devices)
            return allocations, record.bound.total(), sum(device.captured for device in devices)

        results, per_call, progress, passes = [], [], list[str](), list[Launch]()
        if job.warm_up:
            explainer.warm_up(job.warm_up, method=job.calls[0].method, progress=progress.append)
            record.take()
        numbers = [counts()]
        for call in job.calls:
            results.append(
                explainer.explain(
                    call.images,
                    call.targets,
                    method=call.method,
                    budget_ms=call.budget_ms,
                )
            )
            numbers.append(counts())
            per_call.append(record.take())
        notes = explainer.notes
        if job.passes and explainer.on_device is not None:
            method = job.calls[0].method
            assert isinstance(method, CollectionCAM)
            run_passes = explainer.on_device.passes(job.calls[0].images, method)
            run_passes()
            record.take()
            for _ in range(job.passes):
                run_passes()
            passes = record.take()
    allocations, bindings, captures = map(list, zip(*numbers, strict=True))
    return Report(
        results,
        allocations,
        bindings,
        captures,
        per_call,
        passes,
        progress,
        notes,
        captures[-1],
        sum(device.replayed for device in devices),
    )

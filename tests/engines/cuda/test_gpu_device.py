"""The GPU's memory, stream, events, graphs and plans; on a GPU alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ccam_deploy.bundle.folder import read_bundle
from ccam_deploy.engines.base import TensorSpec
from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.engines.cuda.host_engine import HostedGraph
from ccam_deploy.engines.cuda.pycuda import CudaDevice
from ccam_deploy.engines.cuda.slots import Slots
from ccam_deploy.engines.onnxruntime import OnnxRuntimeEngine
from ccam_deploy.engines.tensorrt import plans
from ccam_deploy.engines.tensorrt.library import (
    FLAVOURS,
    Flavour,
    Library,
    load_library,
    present_device,
)
from ccam_deploy.engines.tensorrt.runtime import PlanGraph, SharedPlan
from ccam_deploy.engines.tensorrt.slots import plan_slot
from ccam_deploy.errors import BackendError
from ccam_deploy.kernels.cuda.buffers import Buffers, Spec
from ccam_deploy.kernels.cuda.geometry import Geometry, LayerPlace

pytestmark = pytest.mark.gpu

MIB = 1 << 20
ROUNDING = 1e-4
"""Of the largest value: what another order of the same sums may cost."""


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    device = CudaDevice()
    with device.current():
        yield device
    device.close()


def randoms(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_copies_keep_every_bit(device: CudaDevice) -> None:
    values = randoms(3, 1000)
    first, second = device.allocate(values.nbytes), device.allocate(values.nbytes)
    back = device.pinned(values.shape, values.dtype)
    device.upload(first, values)
    device.copy(second, first, values.nbytes)
    device.download(back, second)
    device.wait()
    np.testing.assert_array_equal(back, values)
    view = device.view(second, values.shape, values.dtype)
    np.testing.assert_array_equal(view.copy_to_host(), values)


def test_work_is_done_in_order(device: CudaDevice) -> None:
    """A long copy and a short one that overwrites its target's start."""
    size = 256 * MIB
    source, target = device.allocate(size), device.allocate(size)
    ones, back = np.ones(8, np.uint8), device.pinned((size,), np.uint8)
    device.upload(source, np.zeros(size, np.uint8))
    device.wait()
    start = device.mark()
    device.copy(target, source, size)
    device.upload(target, ones)
    end = device.mark()
    device.download(back, target)
    device.wait()
    assert back[:8].all()
    assert not back[8:].any()
    assert 1e-6 < device.seconds(start, end) < 1


def test_threads_have_devices_of_their_own() -> None:
    results: list[bool] = []

    def work(seed: int) -> None:
        device = CudaDevice()
        with device.current():
            values = np.full(MIB, seed, np.uint8)
            address, back = device.allocate(MIB), np.zeros(MIB, np.uint8)
            for _ in range(20):
                device.upload(address, values)
                device.download(back, address)
                device.wait()
                results.append(bool((back == seed).all()))
        device.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 80


def test_too_much_memory_is_told(device: CudaDevice) -> None:
    with pytest.raises(BackendError, match="out of memory"):
        device.allocate(1 << 50)


def test_captured_kernels_give_the_same_bits(device: CudaDevice) -> None:
    """All that lies between the graphs, launched, then captured and replayed on new inputs."""
    from ccam_deploy.kernels.cuda.launch import CollectionKernels, Inputs, write_constants

    shape = 64, 14, 14
    geometry = Geometry((LayerPlace(*shape, 0, 0), LayerPlace(*shape, 12544, 12544)), (224, 224), 1)

    def array(spec: Spec) -> Any:
        size = DeviceTensor(0, spec.shape, np.dtype(spec.dtype)).bytes
        return device.view(device.allocate(size), spec.shape, spec.dtype)

    specs = geometry.specs().by_name()
    buffers = Buffers.of({name: array(spec) for name, spec in specs.items()})
    write_constants(geometry, buffers, device.kernel_stream)
    features, gradients = randoms(2 * 12544), randoms(2 * 12544)[::-1].copy()
    places = [device.allocate(features.nbytes) for _ in range(2)]
    owner, k_range = device.allocate(4), device.allocate(8)
    device.upload(owner, np.zeros(1, np.int32))
    device.upload(k_range, np.array([2, 10], np.int32))
    views = [device.view(place, features.shape, np.float32) for place in places]
    inputs = Inputs(
        views[0],
        views[1],
        device.view(owner, (1,), np.int32),
        device.view(k_range, (2,), np.int32),
    )
    kernels = CollectionKernels(geometry, buffers)

    def work() -> None:
        kernels.statistics(inputs, 1.0, device.kernel_stream)
        kernels.partition(inputs, False, device.kernel_stream)
        kernels.sums(inputs, device.kernel_stream)
        kernels.masks(inputs, device.kernel_stream)

    def results(sign: int, run: Any) -> dict[str, NDArray[Any]]:
        device.upload(places[0], features * np.float32(sign))
        device.upload(places[1], gradients)
        run()
        device.wait()
        names = "psi", "labels", "counts", "sums", "starts", "flat", "owner_of_mask", "masks"
        return {name: getattr(buffers, name).copy_to_host() for name in names}

    plain = [results(sign, work) for sign in (1, -1)]
    replay = device.capture(work)
    again = [results(sign, replay) for sign in (1, -1)]
    for one, other in zip(plain, again, strict=True):
        used = one["starts"][2]
        one["masks"], other["masks"] = one["masks"][:used], other["masks"][:used]
        for name, values in one.items():
            assert values.tobytes() == other[name].tobytes(), name
    assert plain[0]["sums"].tobytes() != plain[1]["sums"].tobytes()


def test_work_that_cannot_be_captured_leaves_the_stream_usable(device: CudaDevice) -> None:
    with pytest.raises(BackendError):
        device.capture(device.wait)
    values, back = randoms(8), np.zeros(8, np.float32)
    address = device.allocate(values.nbytes)
    device.upload(address, values)
    device.download(back, address)
    device.wait()
    np.testing.assert_array_equal(back, values)


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def library(request: pytest.FixtureRequest) -> Library:
    flavour: Flavour = request.param
    pytest.importorskip(FLAVOURS[flavour])
    library = load_library(flavour)
    here = present_device()
    if library.capabilities and here not in library.capabilities:
        pytest.skip(f"{flavour} does not support compute capability {here}")
    return library


def made(library: Library, folder: Path, graph: str, to: Path) -> tuple[Path, Path]:
    """A graph of the bundle in float32, and its plan for this GPU."""
    bundle = read_bundle(folder)
    source = bundle.path(bundle.precision("fp32").graphs[graph])
    plan = to / f"{graph}.plan"
    here = (present_device(),)
    plan.write_bytes(plans.build_plan(library, source, plans.profiles(4), here))
    return source, plan


def feeds(inputs: tuple[TensorSpec, ...], batch: int, masks: int) -> dict[str, NDArray[Any]]:
    sizes = {"batch": batch, "masks": masks}
    values: dict[str, NDArray[Any]] = {}
    for number, spec in enumerate(inputs):
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)
        stream = np.random.default_rng(number)
        if spec.name == "owner":
            values[spec.name] = stream.integers(0, batch, shape)
        elif spec.dtype == np.bool_:
            values[spec.name] = stream.random(shape) < 0.5
        else:
            values[spec.name] = stream.standard_normal(shape).astype(spec.dtype)
    return values


@pytest.mark.parametrize("graph", ["backbone", "gradient", "classifier"])
def test_plans_agree_with_onnx_runtime(
    library: Library, digits_bundle: Path, tmp_path: Path, graph: str
) -> None:
    source, path = made(library, digits_bundle, graph, tmp_path)
    device = CudaDevice()
    with device.current():
        plan = SharedPlan(library, path, present_device())
    device.close()
    slots = Slots(lambda: plan_slot({graph: plan}), 1)
    with OnnxRuntimeEngine(source) as wanted, HostedGraph(slots, graph) as engine:
        assert {s.name: (s.dtype, s.shape) for s in engine.inputs + engine.outputs} == {
            s.name: (s.dtype, s.shape) for s in wanted.inputs + wanted.outputs
        }
        for batch, masks in ((1, 3), (4, 24), (2, 70)):
            given = feeds(wanted.inputs, batch, masks)
            expected, found = wanted.run(given), engine.run(given)
            for name, values in expected.items():
                if values.dtype == np.bool_:
                    assert (values == found[name]).mean() > 0.99, name
                else:
                    tolerance = ROUNDING * np.abs(values).max()
                    np.testing.assert_allclose(found[name], values, atol=tolerance, rtol=0)
    slots.close()
    plan.close()


def test_captured_plans_give_the_same_bits(
    library: Library, digits_bundle: Path, tmp_path: Path, device: CudaDevice
) -> None:
    """Also after a run on other shapes has come between."""
    _, path = made(library, digits_bundle, "classifier", tmp_path)
    plan = SharedPlan(library, path, present_device())
    graph = PlanGraph(plan, device, device.allocate(plan.scratch_bytes("latency")))
    (output,) = plan.outputs

    def prepared(masks: int) -> tuple[dict[str, DeviceTensor], NDArray[Any]]:
        logits = np.zeros((masks, *map(int, output.shape[1:])), output.dtype)
        arrays = feeds(plan.inputs, 1, masks) | {output.name: logits}
        tensors = {}
        for name, values in arrays.items():
            tensors[name] = DeviceTensor(device.allocate(values.nbytes), values.shape, values.dtype)
            device.upload(tensors[name].address, values)
        return tensors, logits

    runs = [prepared(masks) for masks in (16, 40)]
    plain, replays = [], []
    for tensors, logits in runs:
        graph.launch(tensors)
        device.download(logits, tensors[output.name].address)
        device.wait()
        plain.append(logits.tobytes())
        assert logits.any()
    assert graph.capturable
    for tensors, _ in runs:
        replays.append(device.capture(partial(graph.launch, tensors)))
    for index in (0, 1, 0):
        tensors, logits = runs[index]
        device.upload(tensors[output.name].address, np.zeros_like(logits))
        replays[index]()
        device.download(logits, tensors[output.name].address)
        device.wait()
        assert logits.tobytes() == plain[index]
    graph.close()
    plan.close()

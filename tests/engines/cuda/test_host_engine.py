"""Graphs on a device for host arrays, over a device whose memory is NumPy's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

from ccam_deploy.bundle.folder import read_bundle
from ccam_deploy.engines import Networks, load_networks
from ccam_deploy.engines.base import TensorSpec
from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.engines.cuda.host_engine import HostedGraph
from ccam_deploy.engines.cuda.slots import Slot, Slots
from ccam_deploy.errors import BackendError
from tests.engines.cuda.host_device import HostDevice, Record, slot_on
from tests.helpers import noise


class NumpyDevice:
    """A device whose work is done at once."""

    stream = 0
    kernel_stream: Any = None

    def __init__(self) -> None:
        self.blocks: dict[int, NDArray[np.uint8]] = {}
        self.allocated: list[int] = []
        self.closed = 0

    def allocate(self, size: int) -> int:
        self.allocated.append(size)
        address = 1 << 12 + len(self.allocated)
        self.blocks[address] = np.zeros(size, np.uint8)
        return address

    def free(self, address: int) -> None:
        del self.blocks[address]

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def view(self, address: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.blocks[address][:size].view(dtype).reshape(shape)

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        return np.empty(shape, dtype)

    def upload(self, address: int, values: NDArray[Any]) -> None:
        assert values.flags.c_contiguous
        self.view(address, values.shape, values.dtype)[...] = values

    def download(self, values: NDArray[Any], address: int) -> None:
        values[...] = self.view(address, values.shape, values.dtype)

    def copy(self, target: int, source: int, size: int) -> None:
        raise NotImplementedError

    def wait(self, mark: object = None) -> None:
        pass

    def mark(self) -> Any:
        raise NotImplementedError

    def seconds(self, start: Any, end: Any) -> float:
        raise NotImplementedError

    def hold(self, thing: object) -> None:
        pass

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        raise NotImplementedError

    def close(self) -> None:
        self.closed += 1


def spec(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), shape)


class Gather:
    """images[owner] · masks, [masks, 3]."""

    inputs: tuple[TensorSpec, ...] = (
        spec("images", "float32", "batch", 3),
        spec("masks", "float32", "masks", 1),
        spec("owner", "int64", "masks"),
    )
    outputs: tuple[TensorSpec, ...] = (
        spec("logits", "float32", "masks", 3),
        spec("kept", "bool", "masks"),
    )
    limits: Mapping[str, int] = {"batch": 2, "masks": 6}
    capturable = False
    replays_itself = False

    def __init__(self, device: NumpyDevice) -> None:
        self.device = device
        self.closed = 0

    def bind(self, tensors: Mapping[str, DeviceTensor]) -> Callable[[], None]:
        return partial(self.launch, tensors)

    def launch(self, tensors: Mapping[str, DeviceTensor]) -> None:
        t = {n: self.device.view(x.address, x.shape, x.dtype) for n, x in tensors.items()}
        t["logits"][...] = t["images"][t["owner"]] * t["masks"]
        t["kept"][...] = t["masks"][:, 0] > 0

    def close(self) -> None:
        self.closed += 1


def hosted(device: NumpyDevice) -> HostedGraph:
    graphs = {"classifier": Gather(device)}
    return HostedGraph(Slots(lambda: Slot(device, {"throughput": graphs}), 1), "classifier")


def feeds(batch: int, masks: int) -> dict[str, NDArray[Any]]:
    stream = np.random.default_rng(batch)
    return {
        "images": stream.random((3, batch), dtype=np.float32).T,
        "masks": stream.random((masks, 1), dtype=np.float32) - np.float32(0.5),
        "owner": np.arange(masks) % batch,
    }


def test_runs_on_host_arrays() -> None:
    device = NumpyDevice()
    graph = Gather(device)
    slots = Slots(lambda: Slot(device, {"throughput": {"classifier": graph}}), 1)
    with HostedGraph(slots, "classifier") as engine:
        for batch, masks in ((2, 3), (1, 6), (2, 1), (2, 15), (5, 4), (5, 23)):
            given = feeds(batch, masks)
            out = engine.run(given)
            wanted = given["images"][given["owner"]] * given["masks"]
            np.testing.assert_array_equal(out["logits"], wanted)
            np.testing.assert_array_equal(out["kept"], given["masks"][:, 0] > 0)
    slots.close()
    assert (graph.closed, device.closed) == (1, 1)


def test_memory_grows_only_for_larger_batches() -> None:
    device = NumpyDevice()
    engine = hosted(device)
    for masks in (4, 3, 4):
        engine.run(feeds(1, masks))
    assert sorted(device.allocated) == [4, 12, 16, 32, 48]
    engine.run(feeds(1, 5))
    assert sorted(device.allocated[5:]) == [5, 20, 40, 60]
    assert sorted(memory.size for memory in device.blocks.values()) == [5, 12, 20, 40, 60]


def test_results_are_not_overwritten() -> None:
    device = NumpyDevice()
    engine = hosted(device)
    first = engine.run(feeds(1, 3))["logits"]
    before = first.copy()
    engine.run(feeds(2, 3))
    np.testing.assert_array_equal(first, before)


def test_unfit_sizes_are_refused() -> None:
    engine = hosted(NumpyDevice())
    given = feeds(1, 4)
    given["owner"] = given["owner"][:3]
    with pytest.raises(BackendError, match='"masks" is 3 in input "owner", 4 in another one'):
        engine.run(given)


@pytest.mark.parametrize("limits", [{"batch": 2, "masks": 3}, {}])
def test_networks_on_a_slot_give_what_the_cpu_gives(
    tiny_bundle: Path, limits: dict[str, int]
) -> None:
    """More images and masks than the graphs take at a time, in any order."""
    bundle = read_bundle(tiny_bundle)
    chosen = bundle.precision("fp32")
    paths = {name: bundle.path(file) for name, file in chosen.graphs.items()}
    slots = Slots(lambda: slot_on(HostDevice(), paths, limits, Record()), 1)
    engines = {name: HostedGraph(slots, name) for name in paths}
    images, masks = noise(5, 3, 32, 48), np.abs(noise(7, 32, 48))
    owner = np.array([4, 0, 2, 2, 4, 1, 0])
    one_hot = np.eye(5, dtype=np.float32)
    with (
        closing(Networks(engines, 1.0, "host", slots)) as got,
        closing(load_networks(paths, 1.0, "onnxruntime-cpu")) as wanted,
    ):
        activations, expected = got.backbone(images), wanted.backbone(images)
        np.testing.assert_allclose(activations.logits, expected.logits, atol=1e-5)
        for values, other in zip(
            got.gradients(activations, one_hot), wanted.gradients(expected, one_hot), strict=True
        ):
            np.testing.assert_allclose(values, other, atol=1e-6)
        np.testing.assert_allclose(
            got.masked_logits(images, masks, owner),
            wanted.masked_logits(images, masks, owner),
            atol=1e-5,
        )

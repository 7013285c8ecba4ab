"""The floor on a device runs the passes of an explanation, and those alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ccam_deploy as ccam
from ccam_deploy.engines.device import DeviceTensor
from ccam_deploy.engines.slots import Slot, Slots
from ccam_deploy.evaluate.device_floor import DeviceFloor, Passes, on_device
from tests.engines.host_device import HostDevice, slot_on
from tests.helpers import Floats, noise

BATCH = 2
IMAGES, MASKS = 3, 9


@pytest.fixture(scope="module")
def explainer(tiny_bundle: Path) -> Iterator[ccam.Explainer]:
    with ccam.load(tiny_bundle, "onnxruntime-cpu") as explainer:
        yield explainer


@pytest.fixture
def slot(explainer: ccam.Explainer) -> Iterator[Slot]:
    bundle = explainer.bundle
    paths = {name: bundle.path(file) for name, file in bundle.precision("fp32").graphs.items()}
    slot = slot_on(HostDevice(), paths, {"batch": BATCH, "masks": 4})
    yield slot
    slot.close()


@pytest.fixture
def passes(explainer: ccam.Explainer) -> Passes:
    images = noise(IMAGES, 3, 32, 48)
    one_hot = np.eye(5, dtype=np.float32)[[1, 4, 0]]
    masks = np.random.default_rng(1).random((MASKS, 32, 48), np.float32)
    owner = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2], np.int64)
    return Passes(images, one_hot, masks, owner, 5)


def read(slot: Slot, tensor: DeviceTensor) -> Floats:
    values: Floats = np.empty(tensor.shape, tensor.dtype)
    slot.device.download(values, tensor.address)
    return values


def test_floor_gives_what_the_engines_give(
    explainer: ccam.Explainer, slot: Slot, passes: Passes
) -> None:
    """Images come in parts of what the engine takes, masks in chunks: the same as all at once."""
    floor = DeviceFloor(slot, passes, cuda_graphs=False)
    floor.run()
    kinds = {id(graph): name for name, graph in slot.graphs["throughput"].items()}
    order = [kinds[id(graph)] for graph, _ in floor.launches]
    part = ["backbone", "gradient"]
    assert order == [*part, "classifier", "classifier", *part, "classifier"]
    networks = explainer.networks
    activations = networks.backbone(passes.images)
    expected = {
        "backbone": activations.logits,
        "classifier": networks.masked_logits(passes.images, passes.masks, passes.owner),
    }
    for name, values in expected.items():
        launched = [t for graph, t in floor.launches if kinds[id(graph)] == name]
        got = np.concatenate([read(slot, tensors["logits"]) for tensors in launched])
        np.testing.assert_allclose(got, values, atol=1e-5)
    gradients = networks.gradients(activations, passes.one_hot)
    launched = [t for graph, t in floor.launches if kinds[id(graph)] == "gradient"]
    for spec, values in zip(slot.graphs["latency"]["gradient"].outputs, gradients, strict=True):
        got = np.concatenate([read(slot, tensors[spec.name]) for tensors in launched])
        np.testing.assert_allclose(got, values, atol=1e-5)
    floor.close()


@pytest.mark.parametrize(("cuda_graphs", "captured", "replayed"), [(True, 1, 3), (False, 0, 0)])
def test_floor_is_kept_and_replayed(
    slot: Slot, passes: Passes, cuda_graphs: bool, captured: int, replayed: int
) -> None:
    """Uploaded and captured once; nothing is uploaded or allocated from then on."""
    slots = Slots(lambda: slot, 1)
    run = on_device(slots, passes, cuda_graphs)
    run()
    assert isinstance(slot.device, HostDevice)
    blocks = set(slot.device.blocks)
    assert blocks
    for _ in range(3):
        run()
    assert set(slot.device.blocks) == blocks
    assert (slot.device.captured, slot.device.replayed) == (captured, replayed)
    (floor,) = slot.kept.values()
    floor.close()
    assert not slot.device.blocks

"""The classifier's own passes on a GPU, with everything they need in its memory already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.engines.base import Array, TensorSpec
from ccam_deploy.engines.device import DeviceGraph, DeviceTensor, Region
from ccam_deploy.engines.slots import Slot, Slots
from ccam_deploy.engines.turns import Turns

Floats = NDArray[np.float32]
_LARGEST_BATCH = 1 << 30


@dataclass(frozen=True)
class Passes:
    """What the passes work on.

    images: [B, C, H, W] float32.   one_hot: [B, classes] float32.   masks: [N, H, W] float32.
    owner: [N] int64, each mask's image, in ascending order.   chunk: the most masks at a time.
    """

    images: Floats
    one_hot: Floats
    masks: Floats
    owner: NDArray[np.int64]
    chunk: int


def on_device(slots: Slots, passes: Passes, cuda_graphs: bool = True) -> Callable[[], None]:
    """A call that runs the passes on whichever slot is free, and waits for them.

    The first call on a slot uploads what they work on; from the third on they are one CUDA graph,
    where the engines can be captured and it is wanted.
    """
    key = "floor", id(passes), cuda_graphs

    def run() -> None:
        with slots.take() as slot:
            floor: DeviceFloor | None = slot.kept.get(key)
            if floor is None:
                floor = slot.kept[key] = DeviceFloor(slot, passes, cuda_graphs)
            floor.run()

    return run


class DeviceFloor:
    """Passes on one slot; made and used while the slot's device is current.

    launches: each graph and its tensors, in the order in which they run.
    """

    def __init__(self, slot: Slot, passes: Passes, cuda_graphs: bool) -> None:
        self._device = slot.device
        graphs = slot.graphs["latency" if len(passes.images) == 1 else "throughput"]
        self._turns = Turns(
            slot.device,
            cuda_graphs,
            lambda: all(graph.capturable for graph in graphs.values()),
            lambda line: None,  # the explanations on the same slot say it
        )
        self._regions: list[Region] = []
        self.launches: list[tuple[DeviceGraph, dict[str, DeviceTensor]]] = []
        most = min(graph.limits.get("batch", _LARGEST_BATCH) for graph in graphs.values())
        for start in range(0, len(passes.images), most):
            self._add(graphs, passes, start, min(most, len(passes.images) - start))

    def run(self) -> None:
        """Run the passes and wait for them."""
        self._turns.run("floor", "floor", self._launch)
        self._turns.mark("")
        self._device.wait()
        self._turns.stages()

    def close(self) -> None:
        """Free the memory."""
        self._device.wait()
        for region in self._regions:
            region.close()

    def _launch(self) -> None:
        for graph, tensors in self.launches:
            graph.launch(tensors)

    def _add(
        self, graphs: Mapping[str, DeviceGraph], passes: Passes, start: int, size: int
    ) -> None:
        """Add the passes of some images."""
        images = passes.images[start : start + size]
        one_hot = passes.one_hot[start : start + size]
        given: dict[str, Array] = {"images": images, "output_gradient": one_hot}
        kept: dict[str, DeviceTensor] = {}
        for name in ("backbone", "gradient"):
            graph = graphs[name]
            fresh = [spec for spec in _specs(graph) if spec.name not in kept]
            kept |= self._place(fresh, {"batch": size}, given)
            self.launches.append((graph, {spec.name: kept[spec.name] for spec in _specs(graph)}))
        classifier = graphs["classifier"]
        own = np.flatnonzero((passes.owner >= start) & (passes.owner < start + size))
        chunk = min(passes.chunk, classifier.limits.get("masks", passes.chunk))
        for part in (own[first : first + chunk] for first in range(0, len(own), chunk)):
            given = {
                "images": images,
                "masks": passes.masks[part, None],
                "owner": passes.owner[part] - start,
            }
            sizes = {"batch": size, "masks": len(part)}
            self.launches.append((classifier, self._place(_specs(classifier), sizes, given)))

    def _place(
        self, specs: list[TensorSpec], sizes: Mapping[str, int], given: Mapping[str, Array]
    ) -> dict[str, DeviceTensor]:
        """Memory for some tensors, with the values that are given for them."""
        region = Region(self._device, dict(_arrays(specs, sizes)))
        self._regions.append(region)
        for name, tensor in region.tensors.items():
            if name in given:
                values = np.ascontiguousarray(given[name], tensor.dtype)
                self._device.upload(tensor.address, values)
        self._device.wait()
        return region.tensors


def _specs(graph: DeviceGraph) -> list[TensorSpec]:
    return [*graph.inputs, *graph.outputs]


def _arrays(
    specs: list[TensorSpec], sizes: Mapping[str, int]
) -> Iterator[tuple[str, tuple[tuple[int, ...], np.dtype[Any]]]]:
    for spec in specs:
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)
        yield spec.name, (shape, spec.dtype)

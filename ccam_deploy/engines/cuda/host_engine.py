"""A graph on a device, for callers whose arrays lie in host memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ccam_deploy.engines.base import Array, Engine, TensorSpec, axis_sizes
from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.engines.cuda.slots import Slot, Slots, Use

_USE: Use = "throughput"


class HostedGraph(Engine):
    """Copies a run's inputs to a slot's device and its outputs back; see Engine.

    Args:
        slots: Where the graph runs; they stay open when the engine is closed.
        name: The graph's name among the slots'.
    """

    def __init__(self, slots: Slots, name: str) -> None:
        self._slots = slots
        self._name = name
        super().__init__()

    def _load_impl(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        with self._slots.take() as slot:
            graph = slot.graphs[_USE][self._name]
        self.limits = dict(graph.limits)
        return graph.inputs, graph.outputs

    def _run_impl(self, feeds: Mapping[str, Array]) -> list[Array]:
        sizes = axis_sizes(self.inputs, feeds)
        with self._slots.take() as slot:
            tensors = {
                spec.name: self._place(slot, spec, sizes) for spec in self.inputs + self.outputs
            }
            # Kept until the device is done: it copies while this thread goes on.
            sent = {name: np.ascontiguousarray(values) for name, values in feeds.items()}
            for name, values in sent.items():
                slot.device.upload(tensors[name].address, values)
            slot.graphs[_USE][self._name].launch(tensors)
            results = [
                np.empty(tensors[spec.name].shape, tensors[spec.name].dtype)
                for spec in self.outputs
            ]
            for spec, values in zip(self.outputs, results, strict=True):
                slot.device.download(values, tensors[spec.name].address)
            slot.device.wait()
        return results

    def _close_impl(self) -> None:
        pass

    def _place(self, slot: Slot, spec: TensorSpec, sizes: Mapping[str, int]) -> DeviceTensor:
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)
        tensor = DeviceTensor(0, shape, spec.dtype)
        address = slot.scratch(f"{self._name}.{spec.name}", tensor.bytes)
        return DeviceTensor(address, shape, spec.dtype)

"""A graph on a device, for callers whose arrays lie in host memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ccam_deploy.engines.base import Array, Engine, TensorSpec
from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.engines.cuda.slots import Slot, Slots, Use
from ccam_deploy.errors import BackendError

_USE: Use = "throughput"


class HostedGraph(Engine):
    """Copies a run's inputs to a slot's device and its outputs back; see Engine.

    slots: stay open when the engine is closed.   name: of the graph among the slots'.
    A run that is larger than the graph takes is done in parts, along the axis that most inputs
    have; an input without that axis goes with every part.
    """

    def __init__(self, slots: Slots, name: str) -> None:
        self._slots = slots
        self._name = name
        super().__init__()

    def _load_impl(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        with self._slots.take() as slot:
            graph = slot.graphs[_USE][self._name]
        names = [size for spec in graph.inputs for size in spec.shape if isinstance(size, str)]
        self._axis = max(names, key=names.count)
        self._step = graph.limits.get(self._axis)
        self.limits = {axis: n for axis, n in graph.limits.items() if axis != self._axis}
        return graph.inputs, graph.outputs

    def _run_impl(self, feeds: Mapping[str, Array]) -> list[Array]:
        sizes = self._sizes(feeds)
        rows = sizes[self._axis]
        step = self._step or rows
        parts = []
        with self._slots.take() as slot:
            for start in range(0, rows, max(step, 1)):
                part = {
                    spec.name: feeds[spec.name][start : start + step]
                    if self._axis in spec.shape
                    else feeds[spec.name]
                    for spec in self.inputs
                }
                parts.append(
                    self._run_part(slot, part, sizes | {self._axis: min(step, rows - start)})
                )
        return [np.concatenate(values) for values in zip(*parts, strict=True)]

    def _run_part(
        self, slot: Slot, feeds: Mapping[str, Array], sizes: Mapping[str, int]
    ) -> list[Array]:
        tensors = {spec.name: self._place(slot, spec, sizes) for spec in self.inputs + self.outputs}
        sent = {name: np.ascontiguousarray(values) for name, values in feeds.items()}
        for name, values in sent.items():
            slot.device.upload(tensors[name].address, values)
        slot.graphs[_USE][self._name].launch(tensors)
        results = [
            np.empty(tensors[spec.name].shape, tensors[spec.name].dtype) for spec in self.outputs
        ]
        for spec, values in zip(self.outputs, results, strict=True):
            slot.device.download(values, tensors[spec.name].address)
        slot.device.wait()
        return results

    def _close_impl(self) -> None:
        pass

    def _sizes(self, feeds: Mapping[str, Array]) -> dict[str, int]:
        """The size of each axis that varies, by its name."""
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            for axis, size in zip(spec.shape, feeds[spec.name].shape, strict=True):
                if isinstance(axis, int):
                    continue
                if sizes.setdefault(axis, size) != size:
                    raise BackendError(
                        f'"{axis}" is {size} in input "{spec.name}", {sizes[axis]} in another one'
                    )
                if size > self.limits.get(axis, size):
                    raise BackendError(
                        f'"{axis}" is {size} in input "{spec.name}"; '
                        f"the engine takes at most {self.limits[axis]}"
                    )
        return sizes

    def _place(self, slot: Slot, spec: TensorSpec, sizes: Mapping[str, int]) -> DeviceTensor:
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)
        tensor = DeviceTensor(0, shape, spec.dtype)
        address = slot.scratch(f"{self._name}.{spec.name}", tensor.bytes)
        return DeviceTensor(address, shape, spec.dtype)

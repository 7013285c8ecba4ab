"""A graph on a device, for callers whose arrays lie in host memory."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np

from ccam_deploy.engines.base import Array, Engine, TensorSpec
from ccam_deploy.engines.device import Device, DeviceGraph, DeviceTensor
from ccam_deploy.errors import BackendError


class HostedGraph(Engine):
    """Copies a run's inputs to the device and its outputs back; see Engine.

    graph, device: the graph's own device; closing the engine closes both.
    Device memory is kept from run to run, and replaced when a larger batch comes.
    """

    def __init__(self, graph: DeviceGraph, device: Device) -> None:
        self._graph = graph
        self._device = device
        self._lock = threading.Lock()
        self._places: dict[str, tuple[int, int]] = {}
        super().__init__()

    @property
    def limits(self) -> Mapping[str, int]:
        """The largest size of each axis that varies; one that is not named has no limit."""
        return self._graph.limits

    def _load_impl(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        return self._graph.inputs, self._graph.outputs

    def _run_impl(self, feeds: Mapping[str, Array]) -> list[Array]:
        with self._lock, self._device.current():
            sizes = self._sizes(feeds)
            tensors = {spec.name: self._place(spec, sizes) for spec in self.inputs + self.outputs}
            sent = {name: np.ascontiguousarray(values) for name, values in feeds.items()}
            for name, values in sent.items():
                self._device.upload(tensors[name].address, values)
            self._graph.launch(tensors)
            results = [
                np.empty(tensors[spec.name].shape, tensors[spec.name].dtype)
                for spec in self.outputs
            ]
            for spec, values in zip(self.outputs, results, strict=True):
                self._device.download(values, tensors[spec.name].address)
            self._device.wait()
            return results

    def _close_impl(self) -> None:
        with self._device.current():
            self._graph.close()
            self._device.close()

    def _sizes(self, feeds: Mapping[str, Array]) -> dict[str, int]:
        """The size of each axis that varies, by its name."""
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            for axis, size in zip(spec.shape, feeds[spec.name].shape, strict=True):
                if isinstance(axis, int):
                    continue
                if sizes.setdefault(axis, size) != size:
                    raise BackendError(
                        f'input "{spec.name}" has {size} {axis}, another one {sizes[axis]}'
                    )
                if size > self.limits.get(axis, size):
                    raise BackendError(
                        f'input "{spec.name}" has {size} {axis}; '
                        f"the engine takes at most {self.limits[axis]}"
                    )
        return sizes

    def _place(self, spec: TensorSpec, sizes: Mapping[str, int]) -> DeviceTensor:
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)
        needed = DeviceTensor(0, shape, spec.dtype).bytes
        address, room = self._places.get(spec.name, (0, -1))
        if needed > room:
            if room >= 0:
                self._device.free(address)
                del self._places[spec.name]
            address = self._device.allocate(needed)
            self._places[spec.name] = address, needed
        return DeviceTensor(address, shape, spec.dtype)

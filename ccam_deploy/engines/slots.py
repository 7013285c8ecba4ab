"""Slots: each a stream with its buffers and contexts, lent to one caller at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from ccam_deploy.engines.device import Device, DeviceGraph
from ccam_deploy.errors import BackendError

Use = Literal["latency", "throughput"]
Graphs = Mapping[str, DeviceGraph]


@dataclass
class Slot:
    """A device's stream and a bundle's graphs on it.

    graphs: by what they are tuned for, a single image or a batch.
    kept: what callers keep here between their turns, such as buffers.
    """

    device: Device
    graphs: Mapping[Use, Graphs]
    kept: dict[Any, Any] = field(default_factory=dict)
    _rooms: dict[str, tuple[int, int]] = field(default_factory=dict)

    def room(self, name: str, size: int) -> int:
        """Memory for one purpose, kept from turn to turn; replaced when more is needed."""
        address, had = self._rooms.get(name, (0, -1))
        if size > had:
            if had >= 0:
                del self._rooms[name]
                self.device.free(address)
            address = self.device.allocate(size)
            self._rooms[name] = address, size
        return address

    def close(self) -> None:
        """Free the graphs, then the device's stream and memory."""
        with self.device.current():
            for graph in {id(g): g for gs in self.graphs.values() for g in gs.values()}.values():
                graph.close()
        self.device.close()


class Slots:
    """Opens slots as callers need them, up to a number; safe to use from several threads.

    open_slot: makes a new slot.   most: how many there may be; more callers wait for their turn.
    """

    def __init__(self, open_slot: Callable[[], Slot], most: int) -> None:
        self._open = open_slot
        self._free: list[Slot] = [open_slot()]
        self._room = threading.Semaphore(most)
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def take(self) -> Iterator[Slot]:
        """Borrow a slot, its device made current. After an error of the engine it is given up."""
        with self._room:
            slot = self._get()
            try:
                with slot.device.current():
                    yield slot
            except BackendError:
                with suppress(BackendError):  # a device that failed may fail again
                    slot.close()
                raise
            except BaseException:
                self._give_back(slot)
                raise
            self._give_back(slot)

    def close(self) -> None:
        """Close all slots; those that are lent close when they come back."""
        with self._lock:
            self._closed = True
            idle, self._free = self._free, []
        for slot in idle:
            slot.close()

    def _get(self) -> Slot:
        with self._lock:
            if self._closed:
                raise BackendError("the engine was closed")
            if self._free:
                return self._free.pop()
        return self._open()

    def _give_back(self, slot: Slot) -> None:
        with self._lock:
            if not self._closed:
                self._free.append(slot)
                return
        slot.close()

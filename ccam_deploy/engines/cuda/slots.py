"""Slots: each a stream with its buffers and contexts, lent to one caller at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar, cast

from ccam_deploy.engines.cuda.device import Device, DeviceGraph
from ccam_deploy.errors import BackendError

Use = Literal["latency", "throughput"]
Graphs = Mapping[str, DeviceGraph]

_KEPT_AT_MOST = 4


class Closable(Protocol):
    """Holds memory of a slot."""

    def close(self) -> None:
        """Give it back."""
        ...


Kept = TypeVar("Kept", bound=Closable)


@dataclass
class Slot:
    """A device's stream and a bundle's graphs on it.

    graphs: by what they are tuned for, a single image or a batch.
    """

    device: Device
    graphs: Mapping[Use, Graphs]
    _kept: dict[Hashable, Closable] = field(default_factory=dict)
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

    def keep(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """What was made for a key, from turn to turn; only what was used last is kept."""
        if key not in self._kept:
            while len(self._kept) >= _KEPT_AT_MOST:
                self._kept.pop(next(iter(self._kept))).close()
            self._kept[key] = make()
        found = self._kept[key] = self._kept.pop(key)
        return cast(Kept, found)

    def close(self) -> None:
        """Wait, and free what is kept, the graphs, then the device's stream and memory."""
        graphs = {id(g): g for gs in self.graphs.values() for g in gs.values()}
        try:
            with self.device.current():
                with suppress(BackendError):  # what went wrong was raised where it was waited for
                    self.device.wait()
                for kept in self._kept.values():
                    kept.close()
                self._kept.clear()
                for graph in graphs.values():
                    graph.close()
        finally:
            self.device.close()


class Slots:
    """Opens slots as callers need them, up to a number; safe to use from several threads.

    open_slot: makes a new slot.   most: how many there may be; more callers wait for their turn.
    close_shared: frees what all slots share, once the last one is closed.
    """

    def __init__(
        self,
        open_slot: Callable[[], Slot],
        most: int,
        close_shared: Callable[[], None] = lambda: None,
    ) -> None:
        self._open = open_slot
        self._close_shared = close_shared
        self._lent = 0
        self._free: list[Slot] = [open_slot()]
        self._room = threading.Semaphore(most)
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def take(self) -> Iterator[Slot]:
        """Borrow a slot, its device made current. After an error of the engine it is given up."""
        with self._room:
            slot = self._get()
            failed = True
            try:
                with slot.device.current():
                    yield slot
                failed = False
            except BackendError:
                raise
            except BaseException:
                with slot.device.current():
                    slot.device.wait()  # for what was put on the stream before
                failed = False
                raise
            finally:
                self._give_back(slot, failed)

    def close(self) -> None:
        """Close all slots; those that are lent close when they come back."""
        with self._lock:
            self._closed = True
            idle, self._free = self._free, []
            last = not self._lent
        for slot in idle:
            slot.close()
        if last:
            self._close_shared()

    def _get(self) -> Slot:
        with self._lock:
            if self._closed:
                raise BackendError("the engine was closed")
            slot = self._free.pop() if self._free else None
            self._lent += 1
        try:
            return slot or self._open()
        except BaseException:
            self._lent -= 1
            raise

    def _give_back(self, slot: Slot, failed: bool) -> None:
        with self._lock:
            self._lent -= 1
            keep = not self._closed and not failed
            last = self._closed and not self._lent
            if keep:
                self._free.append(slot)
        if not keep:
            with suppress(BackendError):  # a device that failed may fail again
                slot.close()
        if last:
            self._close_shared()

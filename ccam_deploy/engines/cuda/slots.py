"""Slots: each is a stream with its buffers and contexts, lent to one caller at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol, TypeVar, cast

from ccam_deploy.engines.cuda.device import Device, DeviceGraph
from ccam_deploy.engines.cuda.gpu_use import GpuUse
from ccam_deploy.engines.cuda.slot_thread import SlotThread
from ccam_deploy.errors import BackendError

Use = Literal["latency", "throughput"]
Graphs = Mapping[str, DeviceGraph]

_PROCESS = GpuUse()
"""Of all slots of this process."""

_MOST_KEPT = 8
"""As many as there are methods that run on a GPU, each with what it has prepared."""


class Closable(Protocol):
    """An object that holds memory of a slot."""

    def close(self) -> None:
        """Free the memory."""
        ...


Kept = TypeVar("Kept", bound=Closable)
Result = TypeVar("Result")


@dataclass
class Slot:
    """A device's stream and a bundle's graphs on it, for one caller at a time.

    Attributes:
        device: The stream and its memory.
        graphs: The graphs by name, tuned for a single image or for a batch.
        worker: Where engines keep what they captured by thread: `run` does all work there. None
            where engines do not care.
    """

    device: Device
    graphs: Mapping[Use, Graphs]
    worker: SlotThread | None = None
    _kept: dict[Hashable, Closable] = field(default_factory=dict)
    _scratch: dict[str, tuple[int, int]] = field(default_factory=dict)

    def scratch(self, name: str, size: int) -> int:
        """Return the address of `size` bytes for one purpose.

        The memory stays allocated; it is replaced when more is needed. Its contents are undefined.
        """
        address, allocated = self._scratch.get(name, (0, -1))
        if size > allocated:
            if allocated >= 0:
                del self._scratch[name]
                self.device.free(address)
            address = self.device.allocate(size)
            self._scratch[name] = address, size
        return address

    def keep(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """Return the object for a key, made on first use; the least recently used are closed."""
        if key not in self._kept:
            while len(self._kept) >= _MOST_KEPT:
                self._kept.pop(next(iter(self._kept))).close()
            self._kept[key] = self._made(make)
        kept = self._kept[key] = self._kept.pop(key)
        return cast(Kept, kept)

    def _made(self, make: Callable[[], Kept]) -> Kept:
        """Make an object; where that fails, once more without the memory of all that is kept."""
        try:
            return self._made_whole(make)
        except BackendError:
            if not self._kept:
                raise
        for kept in self._kept.values():
            kept.close()
        self._kept.clear()
        return self._made_whole(make)

    def _made_whole(self, make: Callable[[], Kept]) -> Kept:
        """Make an object, or free what was allocated for it."""
        before = set(self.device.blocks)
        try:
            return make()
        except BaseException:
            scratch = {address for address, _ in self._scratch.values()}
            for address in set(self.device.blocks) - before - scratch:
                with suppress(BackendError):  # the first error tells more
                    self.device.free(address)
            raise

    def run(self, work: Callable[[], Result]) -> Result:
        """Do some work with the device current, on the slot's thread if it has one.

        Args:
            work: Uses the slot. It ends before this returns, also where this is interrupted.

        Returns:
            What `work` returns.
        """
        if self.worker is None:
            return work()
        return self.worker.run(partial(self._with_device, work))

    def _with_device(self, work: Callable[[], Result]) -> Result:
        with self.device.current():
            return work()

    def close(self) -> None:
        """Wait for the stream, then free what is kept, the graphs and the device's memory."""
        if self.worker is not None:
            self.worker.close()
        graphs = {id(g): g for gs in self.graphs.values() for g in gs.values()}
        try:
            with self.device.current():
                with suppress(BackendError):  # errors were raised where the work was waited for
                    self.device.wait()
                for kept in self._kept.values():
                    kept.close()
                self._kept.clear()
                for graph in graphs.values():
                    graph.close()
        finally:
            self.graphs = {}  # what was kept may live on for a while
            self.device.close()


class Slots:
    """Opens slots as callers need them, up to a number; safe to use from several threads.

    Attributes:
        most: How many slots there may be at a time.
    """

    def __init__(
        self,
        open_slot: Callable[[], Slot],
        most: int,
        close_shared: Callable[[], None] = lambda: None,
        keep_compiled: Callable[[], None] = lambda: None,
        captures_alone: bool = False,
    ) -> None:
        """Open the first slot.

        Args:
            open_slot: Opens a new slot; several threads may call it at a time.
            most: How many slots there may be at a time; more callers wait for their turn.
            close_shared: Frees what all slots share. Called once, after the last slot is closed.
            keep_compiled: Writes what engines compiled so far to files, for the next process.
            captures_alone: Whether engines capture where no other slot of the process works.
        """
        self.keep_compiled = keep_compiled
        self.most = most
        self._open = open_slot
        self._close_shared = close_shared
        self._captures_alone = captures_alone
        self._lent = 0
        with _PROCESS.work(self):
            self._free: list[Slot] = [open_slot()]
        self._permits = threading.Semaphore(most)
        self._lock = threading.Lock()
        self._sole = threading.Lock()
        self._on_each = False
        self._closed = False

    @property
    def lent(self) -> int:
        """How many slots are being opened, used or closed."""
        with self._lock:
            return self._lent

    def claim(self) -> bool:
        """Keep the process's GPUs for the slot that asks, until it is given back.

        Returns:
            Whether it is the only slot at work in the process: that of a single one, or in
            `run_on_each`. False where others work, which go on.
        """
        return (self.most == 1 or self._on_each) and _PROCESS.claim(self)

    @contextmanager
    def take(self) -> Iterator[Slot]:
        """Borrow a slot whose device is current; after an engine's error the slot is closed.

        Raises:
            BackendError: The slots were closed, or a new slot cannot be opened.
        """
        with self._permits, _PROCESS.work(self):
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
                    slot.device.wait()  # for the work that is already on the stream
                failed = False
                raise
            finally:
                self._give_back(slot, failed)

    def run_on_each(self, work: Callable[[Slot], object]) -> None:
        """Do some work on every slot, once no caller holds one.

        Where engines capture alone, no other slot of the process works meanwhile.

        Args:
            work: Uses the slot that it is given.

        Raises:
            BackendError: The slots were closed, or a new slot cannot be opened.
        """
        # Two callers that each hold some of the slots would wait for each other.
        alone = _PROCESS.sole(self) if self._captures_alone else nullcontext()
        with self._sole, alone, ExitStack() as held:
            slots = [held.enter_context(self.take()) for _ in range(self.most)]
            self._on_each = True
            try:
                for slot in slots:
                    slot.run(partial(work, slot))
            finally:
                self._on_each = False

    def close(self) -> None:
        """Close all slots; those that are lent close when they come back."""
        with self._lock:
            first, self._closed = not self._closed, True
            idle, self._free = self._free, []
            # Count this call too: it is the last one where no slot is lent.
            self._lent += len(idle) + first
        failures = []
        with _PROCESS.work(self):
            for slot in idle:
                try:
                    slot.close()
                except BackendError as error:  # the others, and what they share, are closed too
                    failures.append(error)
                finally:
                    self._count_down()
            if first:
                self._count_down()
        if failures:
            raise failures[0]

    def _get(self) -> Slot:
        with self._lock:
            if self._closed:
                raise BackendError("the engine was closed")
            slot = self._free.pop() if self._free else None
            self._lent += 1
        if slot is not None:
            return slot
        try:
            return self._open()
        except BaseException:
            self._count_down()
            raise

    def _give_back(self, slot: Slot, failed: bool) -> None:
        with self._lock:
            keep = not self._closed and not failed
            if keep:
                self._lent -= 1
                self._free.append(slot)
        if not keep:
            try:
                with suppress(BackendError):  # a device that failed may fail again
                    slot.close()
            finally:
                self._count_down()

    def _count_down(self) -> None:
        """Note that a slot is gone; after the last one, free what all of them shared."""
        with self._lock:
            self._lent -= 1
            last = self._closed and not self._lent
        if last:
            self._close_shared()

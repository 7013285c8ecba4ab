"""Work that is put on a stream again and again: replayed as CUDA graphs, and timed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import Any

from ccam_deploy.engines.cuda.device import Device
from ccam_deploy.errors import BackendError

_GRAPHS_AT_MOST = 64


class Turns:
    """Puts work on a device's stream, and times its stages with events.

    replay: capture work that comes a second time with the same key in a CUDA graph, and launch
        that from then on.   capturable: whether the engines can be captured; asked once all have
        run.   note: called with a line where work cannot be captured; it is then
        launched piece by piece, with the same result.
    """

    def __init__(
        self,
        device: Device,
        replay: bool,
        capturable: Callable[[], bool],
        note: Callable[[str], None],
    ) -> None:
        self._device = device
        self._replay = replay
        self._capturable = capturable
        self._note = note
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, Callable[[], None]] = {}
        self._marks: list[tuple[str, Any]] = []
        self._capturing = False

    def run(self, key: Hashable, stage: str, work: Callable[[], None]) -> None:
        """Put work on the stream.

        key: what else `work` depends on, beside the contents of memory.   stage: the name of the
        whole where it is replayed; where it is not, `work` marks its own.
        """
        graph = self._graph(key, work) if self._replay else None
        if graph is None:
            work()
            return
        self.mark(stage)
        graph()

    def forget(self) -> None:
        """Drop marks that an interrupted run left."""
        self._marks.clear()

    def mark(self, stage: str) -> None:
        """Begin a stage at this place on the stream; "" ends the one before it."""
        if not self._capturing:
            self._marks.append((stage, self._device.mark()))

    def stages(self) -> list[tuple[str, float]]:
        """The stages since the last call and their seconds, once the stream was waited for."""
        marks, self._marks = self._marks, []
        return [
            (stage, self._device.seconds(start, end))
            for (stage, start), (_, end) in pairwise(marks)
            if stage
        ]

    def _graph(self, key: Hashable, work: Callable[[], None]) -> Callable[[], None] | None:
        """The graph for some work; none the first time, when kernels are still compiled."""
        if key in self._graphs:
            self._graphs[key] = self._graphs.pop(key)
            return self._graphs[key]
        if key not in self._seen:
            self._seen.add(key)
            return None
        try:
            graph = self._capture(work)
        except BackendError as error:
            self._replay = False
            self._note(f"no CUDA graphs: {error}")
            return None
        if len(self._graphs) >= _GRAPHS_AT_MOST:
            self._graphs.pop(next(iter(self._graphs)))
        self._graphs[key] = graph
        return graph

    def _capture(self, work: Callable[[], None]) -> Callable[[], None]:
        if not self._capturable():
            raise BackendError("the engine cannot be captured in one")
        self._capturing = True
        try:
            return self._device.capture(work)
        finally:
            self._capturing = False

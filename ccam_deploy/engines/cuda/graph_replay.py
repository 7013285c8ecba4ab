"""Runs work on a stream again and again: replays it as CUDA graphs and times its stages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Self

from ccam_deploy.engines.cuda.device import Device, DeviceGraph
from ccam_deploy.errors import BackendError

RETRY_AFTER = 100
"""How often work is launched piece by piece after a failed capture, before the next attempt."""
_MOST_GRAPHS = 256
_MOST_REFUSALS = 3

CudaGraphs = bool | Literal["engines"]
"""Whether work is replayed as CUDA graphs; "engines" for what engines capture by themselves alone,
which leaves the stages between them to be timed one by one."""


@dataclass(frozen=True)
class Part:
    """Some work for the stream.

    Attributes:
        stage: The stage that it begins.
        work: Puts it on the stream, and does not wait.
        is_engine: Whether an engine runs it.
    """

    stage: str
    work: Callable[[], object]
    is_engine: bool = False

    def launch(self, runner: StreamRunner) -> None:
        """Mark the stage, and put the work on the stream."""
        runner.mark(self.stage)
        self.work()


class StreamRunner:
    """Puts work on a device's stream and times its stages with events.

    Work that comes a second time with the same key is captured in a CUDA graph, which is launched
    from then on. Where a capture fails, that work is launched piece by piece, with the same
    result, and captured again after a while. Where the engine refuses several keys in a row,
    nothing is captured any more.
    """

    def __init__(
        self,
        device: Device,
        replay: bool,
        capturable: Callable[[], bool],
        note: Callable[[str], None],
        engines_replay: bool = False,
    ) -> None:
        """Prepare to run work.

        Args:
            device: Whose stream to use.
            replay: Whether to capture work at all.
            capturable: Whether the engines can be captured; called once all of them have run.
            note: Called with a line the first time that work cannot be captured.
            engines_replay: Whether engines are launched by themselves: they keep CUDA graphs of
                their own, or cannot be captured.
        """
        self._device = device
        self._replay = replay
        self._capturable = capturable
        self._note = note
        self._engines_replay = engines_replay
        self._noted = False
        self._runs_before_capture: dict[Hashable, int] = {}
        self._refused: set[Hashable] = set()
        self._graphs: dict[Hashable, Callable[[], None]] = {}
        self._parts: dict[Hashable, Sequence[Part]] = {}
        self._marks: list[tuple[str, Any]] = []
        self._capturing = False

    @classmethod
    def of_graphs(
        cls,
        device: Device,
        replay: CudaGraphs,
        graphs: Collection[DeviceGraph],
        note: Callable[[str], None],
    ) -> Self:
        """Prepare to run work on some graphs.

        Args:
            device: Whose stream to use.
            replay: Whether to capture work.
            graphs: All graphs that the work launches.
            note: Called with a line the first time that work cannot be captured.
        """
        # What is between the engines is captured even where one of these cannot be.
        alone = any(graph.replays_itself or not graph.capturable for graph in graphs)
        return cls(
            device,
            replay is True,
            lambda: alone or all(graph.capturable for graph in graphs),
            note,
            alone,
        )

    def run(self, key: Hashable, stage: str, work: Callable[[], None]) -> None:
        """Put work on the stream.

        Args:
            key: Everything that `work` depends on, except for the contents of memory.
            stage: The name of the whole where a graph is replayed; otherwise `work` marks its own
                stages.
            work: Launches kernels and engines on the stream. It must not wait.
        """
        graph = self._graph(key, work) if self._replay else None
        if graph is None:
            work()
            return
        self.mark(stage)
        graph()

    def put(
        self, key: tuple[Hashable, ...], stage: str, parts: Callable[[], Sequence[Part]]
    ) -> None:
        """Put the parts of some work on the stream: as one graph, or each as a graph of its own.

        Args:
            key: Everything that the work depends on, except for the contents of memory.
            stage: The name of the whole where it is replayed as one graph.
            parts: Makes them, in order, when the key comes for the first time. Engines that keep
                graphs of their own are launched by themselves.
        """
        if key not in self._parts:
            self._parts[key] = parts()
        known = self._parts[key]
        if not self._engines_replay:
            self.run(key, stage, partial(self._launch, known))
            return
        for index, part in enumerate(known):
            if part.is_engine:
                part.launch(self)
            else:
                self.run((*key, index), part.stage, partial(part.launch, self))

    def close(self) -> None:
        """Drop the graphs, the work and the engines."""
        self._capturable = lambda: False
        self._graphs.clear()
        self._parts.clear()
        self._marks.clear()

    def forget(self) -> None:
        """Drop the marks that an interrupted run left."""
        self._marks.clear()

    def mark(self, stage: str) -> None:
        """Begin a stage at this place on the stream; "" ends the one before it."""
        if not self._capturing:
            self._marks.append((stage, self._device.mark()))

    def stages(self) -> list[tuple[str, float]]:
        """Return the stages since the last call and their seconds; wait for the stream first."""
        marks, self._marks = self._marks, []
        return [
            (stage, self._device.seconds(start, end))
            for (stage, start), (_, end) in pairwise(marks)
            if stage
        ]

    def _launch(self, parts: Sequence[Part]) -> None:
        for part in parts:
            part.launch(self)

    def _graph(self, key: Hashable, work: Callable[[], None]) -> Callable[[], None] | None:
        """The graph for some work; None where it must be launched piece by piece this time."""
        if key in self._graphs:
            self._graphs[key] = self._graphs.pop(key)
            return self._graphs[key]
        # Kernels are compiled in the first run, which cannot be captured.
        runs = self._runs_before_capture.setdefault(key, 1)
        if runs > 0:
            self._runs_before_capture[key] = runs - 1
            return None
        if not self._capturable():
            self._refuse(key)
            return None
        self._refused.clear()
        try:
            graph = self._capture(work)
        except BackendError as error:
            # This run, which launches the work piece by piece, is the first of them.
            self._runs_before_capture[key] = RETRY_AFTER - 1
            self._note_once(f"a CUDA graph was not captured: {error}")
            return None
        if len(self._graphs) >= _MOST_GRAPHS:
            oldest = next(iter(self._graphs))
            del self._graphs[oldest]
            # It is captured again after a while: at each return, that would cost too much.
            self._runs_before_capture[oldest] = RETRY_AFTER - 1
        self._graphs[key] = graph
        return graph

    def _refuse(self, key: Hashable) -> None:
        """Launch a key's work piece by piece because the engine cannot be captured."""
        self._runs_before_capture[key] = RETRY_AFTER - 1
        self._refused.add(key)
        if len(self._refused) >= _MOST_REFUSALS:
            self._replay = False
        self._note_once("CUDA graphs are off: this engine cannot be captured")

    def _note_once(self, line: str) -> None:
        if not self._noted:
            self._noted = True
            self._note(line)

    def _capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self._capturing = True
        try:
            return self._device.capture(work)
        finally:
            self._capturing = False

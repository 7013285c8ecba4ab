"""The progress of a TensorRT build.

TensorRT calls the monitor from its own code, which swallows exceptions. The monitor keeps them, for
the builder to raise again once TensorRT has returned.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Report = Callable[[float, str], None]
"""Called with the share that is done, 0 to 1, and the name of the current phase; an exception ends
the build."""


class Phases:
    """Turns the phases that TensorRT reports into the share of a build that is done.

    A phase has steps, and a step may be divided into phases of its own. Phases that were not
    announced do not make the share go back.
    """

    def __init__(self) -> None:
        self._open: dict[str, tuple[int, int]] = {}
        self._share = 0.0

    def start(self, phase: str, steps: int) -> None:
        """Open a phase of so many steps inside of the last one that is open."""
        self._open[phase] = (0, max(steps, 1))

    def step(self, phase: str, index: int) -> None:
        """Note that a phase's step, counted from 0, is done."""
        _, steps = self._open.get(phase, (0, 1))
        self._open[phase] = (min(index + 1, steps), steps)

    def finish(self, phase: str) -> None:
        """Close a phase."""
        self._open.pop(phase, None)

    @property
    def name(self) -> str:
        """The innermost phase that is open."""
        return next(reversed(self._open), "")

    @property
    def share(self) -> float:
        """How much is done, 0 to 1."""
        part, total = 1.0, 0.0
        for done, steps in self._open.values():
            total += part * done / steps
            part /= steps
        self._share = max(self._share, min(total, 1.0))
        return self._share


def monitor(trt: Any, report: Report) -> Any:
    """Make a progress monitor that reports how far the build is, and ends it where that raises.

    Args:
        trt: The TensorRT package.
        report: Called at every phase and step, also by other threads.

    Returns:
        A `trt.IProgressMonitor`; its `failure` is what `report` raised, or None.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases = Phases()
            self.failure: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.phases.start(phase, steps)
            self._report()

        def phase_finish(self, phase: str) -> None:
            self.phases.finish(phase)
            self._report()

        def step_complete(self, phase: str, step: int) -> bool:
            self.phases.step(phase, step)
            return self._report()

        def _report(self) -> bool:
            try:
                time.sleep(0)  # gives a pending Ctrl-C its turn, here where it can be caught
                if self.failure is None:
                    report(self.phases.share, self.phases.name)
            except BaseException as error:
                self.failure = error
            return self.failure is None

    return Monitor()

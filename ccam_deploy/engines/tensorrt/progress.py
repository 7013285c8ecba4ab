"""What TensorRT tells while it builds: its log, and how far it got.

TensorRT calls these objects from its own code, which swallows exceptions: each keeps what was
raised, a Ctrl-C included, for the builder to raise again once TensorRT has returned.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Report = Callable[[float, str], None]
"""Called with the share that is done, 0 to 1, and the name of the phase that goes on."""


class Phases:
    """The share of a build that is done, from the phases in which TensorRT tells of it.

    A phase has steps, and a step may be divided into phases of its own. Phases come that were
    not foreseen; the share never goes back for them.
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


def logger(trt: Any) -> Any:
    """A logger that keeps the first and the last error, and the last warning; it prints nothing.

    first_error: empty where there was none.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.first_error = ""
            self.last_error = "no reason was given"
            self.last_warning = ""
            self.failure: BaseException | None = None

        def log(self, severity: Any, message: str) -> None:
            try:
                if severity <= trt.ILogger.Severity.ERROR:
                    self.last_error = " ".join(message.split())
                    self.first_error = self.first_error or self.last_error
                elif severity == trt.ILogger.Severity.WARNING:
                    self.last_warning = " ".join(message.split())
            except BaseException as error:
                self.failure = error

    return Log()


def monitor(trt: Any, report: Report) -> Any:
    """A progress monitor that passes on how far the build is, and ends it where that raises."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases = Phases()
            self.failure: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.phases.start(phase, steps)
            self._tell()

        def phase_finish(self, phase: str) -> None:
            self.phases.finish(phase)
            self._tell()

        def step_complete(self, phase: str, step: int) -> bool:
            self.phases.step(phase, step)
            return self._tell()

        def _tell(self) -> bool:
            try:
                time.sleep(0)  # gives a pending Ctrl-C its turn, here where it can be caught
                if self.failure is None:
                    report(self.phases.share, self.phases.name)
            except BaseException as error:
                self.failure = error
            return self.failure is None

    return Monitor()

"""How long the stages of an explanation take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up the seconds spent in named stages.

    Args:
        now: Seconds on a clock that only goes forward.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._now = now

    def add(self, stages: Iterable[tuple[str, float]]) -> None:
        """Count seconds that were measured elsewhere to their stages."""
        for name, seconds in stages:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block's time to a stage."""
        started = self._now()
        try:
            yield
        finally:
            self.add([(name, self._now() - started)])

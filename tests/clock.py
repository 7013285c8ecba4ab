"""A clock that does as it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class FakeClock:
    """Time that passes only when a call says so."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time

    def taking(self, durations: Sequence[float]) -> Callable[[], None]:
        left = iter(durations)

        def call() -> None:
            self.time += next(left)

        return call

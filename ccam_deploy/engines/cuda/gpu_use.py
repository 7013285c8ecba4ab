"""Who in this process works on GPUs, so that one can do what bears no other beside it.

While a CUDA graph is captured in the mode that ONNX Runtime takes, CUDA lets no thread of the
process allocate memory: not another explainer's either.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class GpuUse:
    """Lets owners work beside one another, or one of them with all others waiting.

    A thread that works for an owner must not begin work for another one: it could wait for itself.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._working: dict[object, object] = {}  # pieces of work -> their owners
        self._claimant: object | None = None
        self._sole: object | None = None

    @contextmanager
    def work(self, owner: object) -> Iterator[None]:
        """Work for an owner, once no other one is the only one."""
        piece = object()
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._admits(owner))
                self._working[piece] = owner
            yield
        finally:
            with self._changed:
                self._working.pop(piece, None)
                if self._claimant is owner and owner not in self._working.values():
                    self._claimant = None
                self._changed.notify_all()

    def claim(self, owner: object) -> bool:
        """Make a working owner the only one until its work ends.

        Returns:
            Whether it is: not where another one works, or waits to be the only one.
        """
        with self._changed:
            if not self._admits(owner) or set(self._working.values()) != {owner}:
                return False
            self._claimant = owner
            return True

    @contextmanager
    def sole(self, owner: object) -> Iterator[None]:
        """Make an owner the only one, once what others began has ended; for one thread of it."""
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._sole is None and self._admits(owner))
                self._sole = owner
                self._changed.wait_for(lambda: set(self._working.values()) <= {owner})
            yield
        finally:
            with self._changed:
                if self._sole is owner:
                    self._sole = None
                self._changed.notify_all()

    def _admits(self, owner: object) -> bool:
        """Whether no other owner is the only one."""
        return all(only is None or only is owner for only in (self._claimant, self._sole))

"""Who in this process works on GPUs, so that one can do what bears no other beside it.

While a CUDA graph is captured in the mode that ONNX Runtime takes, CUDA lets no thread of the
process allocate memory: not another explainer's either.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class GpuUse:
    """Lets owners work beside one another, or one of them with all others waiting.

    No thread may begin work for an owner while it works for another one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._working: Counter[object] = Counter()
        self._sole: object | None = None
        self._is_held = False

    @contextmanager
    def work(self, owner: object) -> Iterator[None]:
        """Work for an owner, once no other one is the only one."""
        with self._changed:
            self._changed.wait_for(lambda: self._sole is None or self._sole is owner)
            self._working[owner] += 1
        try:
            yield
        finally:
            with self._changed:
                self._working[owner] -= 1
                if not self._working[owner]:
                    del self._working[owner]
                    if not self._is_held and self._sole is owner:
                        self._sole = None
                self._changed.notify_all()

    def claim(self, owner: object) -> bool:
        """Make a working owner the only one until its work ends, if no other works or waits to."""
        with self._changed:
            is_free = self._sole is None or self._sole is owner
            if not is_free or list(self._working) != [owner]:
                return False
            self._sole = owner
            return True

    @contextmanager
    def sole(self, owner: object) -> Iterator[None]:
        """Make an owner that does not work the only one, once what others began has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._sole is None)
            self._sole, self._is_held = owner, True
        try:
            with self._changed:
                self._changed.wait_for(lambda: all(other is owner for other in self._working))
            yield
        finally:
            with self._changed:
                self._sole, self._is_held = None, False
                self._changed.notify_all()

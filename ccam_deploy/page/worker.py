"""One thread that does a page's work, a call at a time, and never keeps the process alive."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from ccam_deploy.errors import BackendError

T = TypeVar("T")
_LOOK_S = 0.1


class Worker:
    """Runs calls one after the other, in the order in which they come, from several threads.

    Attributes:
        busy: Whether a call runs.
    """

    def __init__(self) -> None:
        self.busy = False
        self._waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ended = threading.Event()
        threading.Thread(target=self._work, name="ccam-deploy-page", daemon=True).start()

    def call(self, function: Callable[[], T]) -> T:
        """Run a function when its turn comes, and wait for it.

        Args:
            function: Called without arguments in the worker's thread.

        Returns:
            What it returns.

        Raises:
            BackendError: The worker was ended; the function may still run.
            BaseException: What the function raises.
        """
        outcome: Future[T] = Future()

        def run() -> None:
            try:
                outcome.set_result(function())
            except BaseException as error:
                outcome.set_exception(error)

        self._waiting.put(run)
        while not self._ended.is_set():
            try:
                outcome.exception(_LOOK_S)
            except TimeoutError:
                continue
            return outcome.result()
        raise BackendError("the page is ending")

    def end(self) -> None:
        """Let nobody wait any longer; what runs is left to its thread."""
        self._ended.set()

    def _work(self) -> None:
        while not self._ended.is_set():
            work = self._waiting.get()
            self.busy = True
            work()
            self.busy = False

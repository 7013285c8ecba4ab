"""A thread that does a slot's work, at little more than the cost of waking it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class SlotThread:
    """Does work in one thread, a call at a time; the thread ends with the process at the latest.

    Args:
        name: The thread's name.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        self._lock = threading.Lock()
        # Python joins other threads before it runs what is to run at its end.
        thread = threading.Thread(target=_serve, args=(self._calls,), name=name, daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _end, self._calls, self._lock, thread)

    def run(self, work: Callable[[], Result]) -> Result:
        """Do some work in the thread, and wait.

        Args:
            work: It ends before this returns, also where this is interrupted once.

        Returns:
            What `work` returns.

        Raises:
            RuntimeError: The thread has ended.
            BaseException: What `work` raises.
        """
        call = _Call(work)
        try:
            self._put(call)
            return call.outcome()
        except BaseException:
            self._finish()
            raise

    def close(self) -> None:
        """End the thread, once its work is done. Closing twice does nothing."""
        self._end()

    def _finish(self) -> None:
        """Wait for whatever was to be done before."""
        last = _Call(lambda: None)
        with suppress(RuntimeError):
            self._put(last)
            last.outcome()

    def _put(self, call: _Call[Any]) -> None:
        with self._lock:  # nothing may come behind the end, where it would wait for ever
            if not self._end.alive:
                raise RuntimeError("the slot's thread has ended")
            self._calls.put(call)


class _Call(Generic[Result]):
    """Some work, and then what came of it."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self._result: Result
        self._error: BaseException | None = None
        self._done = threading.Lock()
        self._done.acquire()

    def do(self) -> None:
        """Do the work, in the thread."""
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error
        self._done.release()

    def outcome(self) -> Result:
        """Wait for the work; return what it returned, or raise what it raised."""
        self._done.acquire()
        # The error's traceback leads back to here: what holds it would only go with a collection.
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return self._result
        finally:
            del error


def _serve(calls: SimpleQueue[_Call[Any] | None]) -> None:
    while (call := calls.get()) is not None:
        call.do()
        del call  # while the thread waits, results belong to whoever asked for them


def _end(
    calls: SimpleQueue[_Call[Any] | None], lock: threading.Lock, thread: threading.Thread
) -> None:
    with lock:
        calls.put(None)
    if thread is not threading.current_thread():
        thread.join()

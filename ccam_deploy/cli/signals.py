"""How commands answer Ctrl-C and SIGTERM: the stack unwinds, so that clean-up runs."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ccam_deploy.termination import Terminated

TERMINATED = "error: terminated; nothing was left half-written"
"""The line that a command ends with at SIGTERM."""
_RETRY_SECONDS = 0.05


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Raise KeyboardInterrupt at Ctrl-C, and Terminated at the first SIGTERM.

    While a module is being imported they wait: some libraries swallow what is raised then, or
    report it as a failed import. Where Python itself swallows them, in a destructor or a callback
    of a C library, they are raised once more. Later SIGTERMs are ignored while clean-up runs. Where
    Ctrl-C is ignored or handled otherwise, it stays so. Does nothing outside of the main thread,
    where no handler can be set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            waiting.append(number)
        if _importing(frame):
            signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)
            return
        if not waiting:  # what it waited for was raised meanwhile
            return
        terminated = signal.SIGTERM in waiting
        waiting.clear()
        if not terminated:
            raise KeyboardInterrupt
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    def hear(unraisable: sys.UnraisableHookArgs) -> None:
        if not isinstance(unraisable.exc_value, Terminated | KeyboardInterrupt):
            previous_hook(unraisable)
            return
        terminated = isinstance(unraisable.exc_value, Terminated)
        waiting.append(signal.SIGTERM if terminated else signal.SIGINT)
        signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)

    numbers = [signal.SIGTERM, signal.SIGALRM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    previous = {number: signal.signal(number, leave) for number in numbers}
    previous_hook, sys.unraisablehook = sys.unraisablehook, hear
    try:
        yield
    finally:
        sys.unraisablehook = previous_hook
        signal.setitimer(signal.ITIMER_REAL, 0)
        _put_back(previous)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _put_back(handlers: Mapping[signal.Signals, Any]) -> None:
    """Set handlers again; what was not set by Python, which reads as None, gets the default."""
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def kept_handlers() -> Iterator[None]:
    """Undo what a library does to the handling of signals, such as Ray when it is started.

    Raises:
        Terminated: The library's own handler has answered SIGTERM by an exit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit as error:
        raise error if isinstance(error, Terminated) else Terminated() from error
    finally:
        _put_back(before)


@contextmanager
def held_signals() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C and SIGTERM back around a library that would swallow their exceptions.

    Signals that are ignored, or end the process at once, stay so.

    Yields:
        A function to call wherever an exception can pass: it raises what a held signal raises,
        KeyboardInterrupt or Terminated. The end of the block does the same.
    """
    held: list[int] = []
    handlers: dict[int, Any] = {}

    def hold(signum: int, frame: FrameType | None) -> None:
        held.append(signum)

    def release() -> None:
        if held:
            handlers[held[0]](held[0], None)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(signal.getsignal(number)):
                handlers[number] = signal.signal(number, hold)
    try:
        yield release
    finally:
        for held_number, handler in handlers.items():
            signal.signal(held_number, handler)
    release()

"""Shares the rows of a large array among a few threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from typing import Any, TypeVar

from numpy.typing import NDArray

Result = TypeVar("Result")

MOST_PARTS = 4
_BYTES_OF_PART = 1 << 20
"""Less is copied sooner than a thread begins."""


def over_rows(
    threads: Executor | None, work: Callable[[slice], Result], array: NDArray[Any]
) -> list[Result]:
    """Do some work on all rows of an array, a part of a large array in each thread.

    Args:
        threads: They help the caller's thread; None where it is to do all work.
        work: Is given some of the rows. It holds Python's lock no longer than it must. All of it
            ends before this returns, also where this is interrupted.
        array: What it works on.

    Returns:
        What it returns for each part, in order.
    """
    rows, most = len(array), MOST_PARTS if threads is not None else 1
    parts = max(1, min(rows, most, array.nbytes // _BYTES_OF_PART))
    first, *others = [slice(rows * i // parts, rows * (i + 1) // parts) for i in range(parts)]
    if threads is None or not others:
        return [work(first)]
    helpers: list[Future[Result]] = []
    try:
        with suppress(RuntimeError):  # the threads were ended meanwhile
            helpers.extend(threads.submit(work, part) for part in others)
        mine = [work(first)]
        rest = [work(part) for part in others[len(helpers) :]]
        return mine + [helper.result() for helper in helpers] + rest
    except BaseException:
        wait(helpers)
        raise

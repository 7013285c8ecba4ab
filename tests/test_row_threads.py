"""Large arrays are worked on by several threads, each row once; small ones by the caller's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ccam_deploy.row_threads import MOST_PARTS, over_rows

LARGE = np.zeros((37, 1 << 17), np.float64)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(MOST_PARTS - 1) as pool:
        yield pool


def rows_of(parts: list[slice]) -> list[int]:
    return [row for part in parts for row in range(part.start, part.stop)]


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 37])
def test_every_row_is_worked_on_once(rows: int, threads: ThreadPoolExecutor) -> None:
    parts = over_rows(threads, lambda part: part, LARGE[:rows])
    assert rows_of(parts) == list(range(rows))
    assert len(parts) == max(1, min(rows, MOST_PARTS))


@pytest.mark.parametrize("array", [LARGE[:1], LARGE[:, :1000]])
def test_the_caller_works_alone_on_little(
    array: np.ndarray[tuple[int, int], np.dtype[np.float64]], threads: ThreadPoolExecutor
) -> None:
    assert over_rows(threads, lambda _: threading.get_ident(), array) == [threading.get_ident()]
    assert over_rows(None, lambda _: threading.get_ident(), LARGE) == [threading.get_ident()]


@pytest.mark.parametrize("fails", [0, 1])
def test_nothing_goes_on_once_it_failed(fails: int, threads: ThreadPoolExecutor) -> None:
    """Also in the caller's thread, which may be interrupted."""
    parts, failed, ended = threading.Barrier(2), threading.Event(), list[int]()

    def work(part: slice) -> None:
        number = int(part.start > 0)
        parts.wait(60)
        if number == fails:
            failed.set()
            raise KeyboardInterrupt
        failed.wait(60)
        ended.append(number)

    with pytest.raises(KeyboardInterrupt):
        over_rows(threads, work, LARGE[:2])
    assert ended == [1 - fails]


def test_the_caller_does_what_threads_refuse() -> None:
    """They were ended by another thread, between the look at them and the work."""
    ended = ThreadPoolExecutor(MOST_PARTS - 1)
    ended.shutdown()
    assert rows_of(over_rows(ended, lambda part: part, LARGE)) == list(range(len(LARGE)))

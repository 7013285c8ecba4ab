"""The next batch is prepared while the one before it is in use."""

from __future__ import annotations

import threading

import pytest

from ccam_deploy.errors import ImageError
from ccam_deploy.prefetch import prepared_ahead


def test_order_and_results() -> None:
    for count in (0, 1, 2, 5):
        assert list(prepared_ahead(lambda n: n * n, range(count))) == [n * n for n in range(count)]


def test_one_ahead_and_not_more() -> None:
    started = [threading.Event() for _ in range(4)]
    results = prepared_ahead(lambda n: started[n].set(), range(4))
    for n in range(3):
        next(results)
        assert started[n + 1].wait(60)
        assert not started[n + 2].is_set() if n < 2 else True
    next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_an_error_comes_in_its_place() -> None:
    def prepare(n: int) -> int:
        if n == 2:
            raise ImageError("the image is broken")
        return n

    results = prepared_ahead(prepare, range(4))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ImageError, match="broken"):
        next(results)


def test_a_caller_that_stops_leaves_no_thread() -> None:
    before = threading.active_count()
    results = prepared_ahead(lambda n: n, range(100))
    assert next(results) == 0
    assert threading.active_count() == before + 1
    results.close()
    assert threading.active_count() == before

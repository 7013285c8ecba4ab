"""Stages' seconds add up, whatever happens in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ccam_deploy.methods import Stopwatch


def ticking(*seconds: float) -> Callable[[], float]:
    """A clock that shows these times one after another."""
    times: Iterator[float] = iter(seconds)
    return lambda: next(times)


def test_stages_add_up() -> None:
    clock = Stopwatch(ticking(0, 2, 10, 10.5, 20, 23))
    with clock.stage("masks"):
        pass
    with clock.stage("classifier"):
        pass
    with clock.stage("masks"):
        pass
    assert clock.seconds == {"masks": 5, "classifier": 0.5}


def test_nested_stages_are_counted_on_their_own() -> None:
    clock = Stopwatch(ticking(0, 1, 4, 6))
    with clock.stage("outer"), clock.stage("inner"):
        pass
    assert clock.seconds == {"inner": 3, "outer": 6}


def test_a_stage_that_fails_is_counted() -> None:
    clock = Stopwatch(ticking(1, 8))
    with pytest.raises(ZeroDivisionError), clock.stage("gradient"):
        _ = 1 / 0
    assert clock.seconds == {"gradient": 7}


def test_stopwatch_runs_on_a_real_clock() -> None:
    clock = Stopwatch()
    with clock.stage("work"):
        sum(range(1000))
    assert clock.seconds["work"] > 0

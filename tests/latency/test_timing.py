"""The timing code of the benchmarks, with a clock that does as it is told."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ccam_deploy.latency.timing import (
    measure_in_turn,
    measure_load,
    median_ratio,
    spread_within_inputs,
    summarise,
)
from tests.clock import FakeClock


def test_calls_take_turns_and_warm_up_is_left_out() -> None:
    clock = FakeClock()
    calls = {"a": clock.taking([9, 1, 2, 3]), "b": clock.taking([9, 4, 5, 6])}
    seconds = measure_in_turn(calls, rounds=3, warmup=1, now=clock)
    assert seconds == {"a": [1, 2, 3], "b": [4, 5, 6]}


def test_turns_alternate() -> None:
    order: list[str] = []
    measure_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, 1)
    assert order == ["a", "b"] * 3


@pytest.mark.parametrize(("duration", "rounds"), [(0, 2), (9, 2), (11, 3), (16, 4)])
def test_turns_go_on_until_the_time_is_over(duration: float, rounds: int) -> None:
    clock = FakeClock()
    calls = {"a": clock.taking([2] * 9), "b": clock.taking([3] * 9)}
    seconds = measure_in_turn(calls, 2, warmup=4, duration=duration, now=clock)
    assert seconds == {"a": [2] * rounds, "b": [3] * rounds}


@pytest.mark.parametrize(("duration", "calls"), [(0, 2), (5, 3), (6, 3), (7, 4)])
def test_load_of_one_thread(duration: float, calls: int) -> None:
    clock = FakeClock()
    load = measure_load([clock.taking([2] * 9)], duration, fewest=2, now=clock)
    assert load.seconds == [2] * calls
    assert load.wall == 2 * calls
    assert load.rate == 0.5


@pytest.mark.parametrize(
    ("deadline", "warm", "timed"), [(0, 0, 1), (1, 1, 1), (20, 2, 2), (22, 3, 2), (999, 4, 6)]
)
def test_turns_are_cut_at_the_deadline(deadline: float, warm: int, timed: int) -> None:
    """Rounds of 5 seconds, 4 of them warm-up: that ends at half of the time, and one is timed."""
    clock = FakeClock()
    calls = {"a": clock.taking([2] * 99), "b": clock.taking([3] * 99)}
    begun = clock.time
    seconds = measure_in_turn(calls, 6, warmup=4, now=clock, deadline=begun + deadline)
    assert seconds == {"a": [2] * timed, "b": [3] * timed}
    assert clock.time - begun == 5 * (warm + timed)


@pytest.mark.parametrize(("deadline", "calls"), [(-1, 1), (1, 1), (3, 2), (4, 2), (99, 5)])
def test_load_is_cut_at_the_deadline(deadline: float, calls: int) -> None:
    clock = FakeClock()
    call = clock.taking([2] * 9)
    load = measure_load([call], 9.0, fewest=4, now=clock, deadline=clock.time + deadline)
    assert load.seconds == [2] * calls


def test_load_runs_threads_at_the_same_time() -> None:
    """Every call waits for one of the other thread; alone, the first would time out."""
    both = threading.Barrier(2)
    ticks = itertools.count()
    calls: list[Callable[[], object]] = [lambda: both.wait(60), lambda: both.wait(60)]
    load = measure_load(calls, 0.0, fewest=50, now=lambda: next(ticks))
    assert [len(seconds) for seconds in load.threads] == [50, 50]
    # Two threads read the clock before their first call, and twice for each of 50 calls.
    assert load.wall == 2 * (1 + 2 * 50) - 1 > max(load.seconds)
    assert load.rate == pytest.approx(100 / load.wall)


@pytest.mark.parametrize("threads", [1, 2])
def test_load_raises_what_a_call_raises(threads: int) -> None:
    def broken() -> None:
        raise ValueError("the engine broke")

    calls: list[Callable[[], object]] = [broken, lambda: None]
    with pytest.raises(ValueError, match="the engine broke"):
        measure_load(calls[:threads], 60.0)


def test_summary_by_hand() -> None:
    timing = summarise([0.001, 0.002, 0.003, 0.004, 0.005])
    assert timing.calls == 5
    assert timing.median == pytest.approx(3)
    assert timing.mean == pytest.approx(3)
    assert (timing.minimum, timing.maximum) == pytest.approx((1, 5))
    assert timing.p90 == pytest.approx(4.6)
    assert timing.p99 == pytest.approx(4.96)
    assert timing.spread == 0.667  # 2 / 3, to three decimals


def test_nothing_cannot_be_summarised() -> None:
    with pytest.raises(ValueError, match="nothing to summarise"):
        summarise([])


def test_ratio_is_of_rounds_not_of_medians() -> None:
    assert median_ratio([2, 30, 400], [1, 10, 100]) == 3
    assert median_ratio([8, 1, 5], [2, 1, 1]) == 4


def test_spread_leaves_the_kinds_out() -> None:
    """Two images of 10 and 100 ms, each to the millisecond, are steady; one that varies is not."""
    assert summarise([10, 100] * 4).spread > 1
    assert spread_within_inputs([[10, 100] * 4, [10, 100]], inputs=2) == 0
    assert spread_within_inputs([[8, 100, 10, 100, 12, 100]], inputs=2) == 0
    spread = spread_within_inputs([[8, 80, 10, 100, 12, 120]], inputs=2)
    assert spread == pytest.approx(summarise([0.8, 1, 1.2] * 2).spread)
    assert spread_within_inputs([[1, 2, 3, 4, 5]], inputs=1) == summarise([1, 2, 3, 4, 5]).spread


def test_a_signal_before_all_threads_started_ends_the_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The threads that wait for the others do not wait for ever."""
    submit = ThreadPoolExecutor.submit
    submitted: list[Any] = []

    def interrupted(pool: Any, function: Any, *words: Any) -> Any:
        if submitted:
            raise KeyboardInterrupt
        submitted.append(submit(pool, function, *words))
        return submitted[0]

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    ended: list[type[BaseException]] = []

    def run() -> None:
        try:
            measure_load([lambda: None] * 2, 60.0)
        except BaseException as error:
            ended.append(type(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert ended == [KeyboardInterrupt]

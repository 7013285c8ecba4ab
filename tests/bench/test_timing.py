"""The timing code of the benchmarks, with a clock that does as it is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.timing import as_dict, conditions, measure_in_turn, summarise


class FakeClock:
    """Time that passes only when a call says so."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time

    def taking(self, durations: list[float]) -> Callable[[], None]:
        left = iter(durations)

        def call() -> None:
            self.time += next(left)

        return call


def test_calls_take_turns_and_warm_up_is_left_out() -> None:
    clock = FakeClock()
    calls = {"a": clock.taking([9, 1, 2, 3]), "b": clock.taking([9, 4, 5, 6])}
    seconds = measure_in_turn(calls, rounds=3, warmup=1, now=clock)
    assert seconds == {"a": [1, 2, 3], "b": [4, 5, 6]}


def test_turns_alternate() -> None:
    order: list[str] = []
    measure_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, 1)
    assert order == ["a", "b"] * 3


def test_summary_by_hand() -> None:
    timing = summarise([0.001, 0.002, 0.003, 0.004, 0.005])
    assert timing.calls == 5
    assert timing.median == pytest.approx(3)
    assert timing.mean == pytest.approx(3)
    assert (timing.minimum, timing.maximum) == pytest.approx((1, 5))
    assert timing.p90 == pytest.approx(4.6)
    assert timing.p99 == pytest.approx(4.96)
    assert timing.spread == pytest.approx(2 / 3)
    assert as_dict(timing)["median"] == 3.0


def test_nothing_cannot_be_summarised() -> None:
    with pytest.raises(ValueError, match="nothing to summarise"):
        summarise([])


def test_conditions_name_versions_and_machine() -> None:
    found = conditions()
    assert {"numpy", "onnxruntime", "torch"} <= set(found["versions"])
    assert found["processor"]
    assert found["cores"] >= 1

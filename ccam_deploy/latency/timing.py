"""How long calls take: repeated, in turn or at the same time, and their distribution."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

FEWEST_CALLS = 3
"""However long one takes, so many calls are timed."""

Call = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """The distribution of a call's duration, in milliseconds.

    spread: the middle half's width as a share of the median.
    """

    calls: int
    median: float
    mean: float
    minimum: float
    maximum: float
    p90: float
    p95: float
    p99: float
    spread: float


def summarise(seconds: Sequence[float]) -> Timing:
    """Summarise durations. Raises ValueError for none."""
    if not seconds:
        raise ValueError("there is nothing to summarise")
    values = np.asarray(seconds, np.float64) * 1000
    low, median, high, p90, p95, p99 = np.percentile(values, [25, 50, 75, 90, 95, 99])
    return Timing(
        calls=len(values),
        median=float(median),
        mean=float(values.mean()),
        minimum=float(values.min()),
        maximum=float(values.max()),
        p90=float(p90),
        p95=float(p95),
        p99=float(p99),
        spread=float((high - low) / median) if median else 0.0,
    )


def spread_of_kinds(runs: Iterable[Sequence[float]], kinds: int) -> float:
    """Like Timing.spread, where the calls of each run go through some kinds over and over.

    Each duration counts by its share of the median of its kind, so that kinds that take longer by
    nature do not make it.
    """
    lists = [list(seconds) for seconds in runs]
    shares: list[float] = []
    for kind in range(kinds):
        own = [value for seconds in lists for value in seconds[kind::kinds]]
        middle = float(np.median(own)) if own else 0.0
        shares += [value / middle for value in own] if middle else []
    return summarise(shares).spread if shares else 0.0


def as_dict(timing: Timing) -> dict[str, float]:
    """A timing as plain numbers, rounded to microseconds."""
    return {name: round(value, 3) for name, value in asdict(timing).items()}


def median_ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """The median of the ratios of two calls that were timed in turn, round by round."""
    return round(float(np.median(np.divide(one, other))), 4)


def measure_in_turn(
    calls: Mapping[str, Call],
    rounds: int,
    warmup: int = 1,
    duration: float = 0.0,
    now: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Time several calls in turn, A B C A B C ..., so that a slow moment meets all alike.

    rounds: how many at least; more follow until `duration` seconds have passed since the warm-up.
    Returns the seconds of every call but the warm-up's, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warmup):
        for call in calls.values():
            call()
    begun = now()
    done = 0
    while done < rounds or now() - begun < duration:
        for name, call in calls.items():
            started = now()
            call()
            seconds[name].append(now() - started)
        done += 1
    return seconds


@dataclass(frozen=True)
class Load:
    """A steady load. threads: the seconds of each one's calls.   wall: from first to last."""

    threads: tuple[list[float], ...]
    wall: float

    @property
    def seconds(self) -> list[float]:
        """Every call's, thread by thread."""
        return [value for seconds in self.threads for value in seconds]

    @property
    def rate(self) -> float:
        """Calls a second, of all threads together."""
        return len(self.seconds) / self.wall


def measure_load(
    calls: Sequence[Call],
    duration: float,
    fewest: int = FEWEST_CALLS,
    now: Clock = time.perf_counter,
) -> Load:
    """Repeat each call in a thread of its own, all at the same time, without a pause.

    duration: seconds after which no call starts any more, once each thread has made `fewest`.
    What a call raises ends all threads and is raised here.
    """
    gate = threading.Barrier(len(calls))
    stop = threading.Event()

    def repeat(call: Call) -> tuple[float, float, list[float]]:
        gate.wait()
        seconds: list[float] = []
        begun = ended = now()
        try:
            while not stop.is_set() and (ended - begun < duration or len(seconds) < fewest):
                started = now()
                call()
                ended = now()
                seconds.append(ended - started)
        except BaseException:
            stop.set()
            raise
        return begun, ended, seconds

    if len(calls) == 1:
        runs = [repeat(calls[0])]
    else:
        with ThreadPoolExecutor(len(calls)) as pool:
            running = [pool.submit(repeat, call) for call in calls]
            try:
                runs = [run.result() for run in running]
            finally:
                stop.set()
    begun = min(run[0] for run in runs)
    ended = max(run[1] for run in runs)
    return Load(tuple(run[2] for run in runs), ended - begun)

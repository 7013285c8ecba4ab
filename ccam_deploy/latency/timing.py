"""How long calls take: repeated, in turn or at the same time, and their distribution."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import numpy as np

FEWEST_CALLS = 3
"""The least number of timed calls, however long a call takes."""

WARM_CALLS = 3
"""Calls that warm up each input before it is timed."""

NEVER = math.inf
"""A deadline that does not come."""

Call = Callable[[], object]
Clock = Callable[[], float]


class Timing(msgspec.Struct, frozen=True):
    """The distribution of a call's duration, in milliseconds rounded to microseconds.

    Attributes:
        calls: How many calls were timed.
        median: The median, as linear interpolation gives it; so are the percentiles.
        mean: The arithmetic mean.
        minimum: The shortest call.
        maximum: The longest call.
        p90: The 90th percentile.
        p95: The 95th percentile.
        p99: The 99th percentile.
        spread: The interquartile range as a share of the median, no unit.
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
    """Summarise durations.

    Args:
        seconds: The duration of each call.

    Returns:
        Their distribution in milliseconds.

    Raises:
        ValueError: There are no durations.
    """
    if not seconds:
        raise ValueError("there is nothing to summarise")
    values = np.asarray(seconds, np.float64) * 1000
    low, median, high, p90, p95, p99 = np.percentile(values, [25, 50, 75, 90, 95, 99])
    return Timing(
        calls=len(values),
        median=_rounded(median),
        mean=_rounded(values.mean()),
        minimum=_rounded(values.min()),
        maximum=_rounded(values.max()),
        p90=_rounded(p90),
        p95=_rounded(p95),
        p99=_rounded(p99),
        spread=_rounded((high - low) / median) if median else 0.0,
    )


def spread_within_inputs(runs: Iterable[Sequence[float]], inputs: int) -> float:
    """Compute Timing.spread of calls that cycle through inputs, without the inputs' differences.

    Each duration counts as a share of the median for its input, so inputs that take longer by
    nature do not widen the spread.

    Args:
        runs: Durations of each thread's calls, in the order of the calls.
        inputs: How many inputs the calls cycle through.

    Returns:
        The interquartile range as a share of the median; 0 without calls.
    """
    threads = [list(durations) for durations in runs]
    shares: list[float] = []
    for place in range(inputs):
        durations = [value for thread in threads for value in thread[place::inputs]]
        middle = float(np.median(durations)) if durations else 0.0
        shares += [value / middle for value in durations] if middle else []
    return summarise(shares).spread if shares else 0.0


def median_ratio(durations: Sequence[float], references: Sequence[float]) -> float:
    """Compute the median over rounds of duration / reference, for calls timed in turn.

    Args:
        durations: One value a round.
        references: One value a round, in the same unit.

    Returns:
        The median of the ratios, rounded to four decimals.
    """
    return round(float(np.median(np.divide(durations, references))), 4)


def measure_in_turn(
    calls: Mapping[str, Call],
    rounds: int,
    warmup: int = 1,
    duration: float = 0.0,
    now: Clock = time.perf_counter,
    deadline: float = NEVER,
) -> dict[str, list[float]]:
    """Time several calls in turn, A B C A B C ..., so that a slow moment meets all alike.

    Args:
        calls: What is timed, by name.
        rounds: The least number of rounds; more follow until `duration` has passed.
        warmup: Rounds that are run first and not timed.
        duration: Seconds since the end of the warm-up after which no round starts.
        now: A clock in seconds.
        deadline: The moment after which no round starts but the first that is timed. The warm-up
            takes half of the time until then at most.

    Returns:
        The seconds of every timed call, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    warm_until = midway(now(), deadline)
    for _ in range(warmup):
        if now() >= warm_until:
            break
        for call in calls.values():
            call()
    begun = now()
    done = 0
    while not done or (now() < deadline and (done < rounds or now() - begun < duration)):
        for name, call in calls.items():
            started = now()
            call()
            seconds[name].append(now() - started)
        done += 1
    return seconds


@dataclass(frozen=True)
class Load:
    """Durations of calls under a steady load.

    Attributes:
        threads: For each thread the seconds of its calls.
        wall: Seconds from the start of the first call to the end of the last.
    """

    threads: tuple[list[float], ...]
    wall: float

    @property
    def seconds(self) -> list[float]:
        """The seconds of every call, thread by thread."""
        return [value for seconds in self.threads for value in seconds]

    @property
    def rate(self) -> float:
        """Calls per second, of all threads together."""
        return len(self.seconds) / self.wall


def measure_load(
    calls: Sequence[Call],
    duration: float,
    fewest: int = FEWEST_CALLS,
    now: Clock = time.perf_counter,
    deadline: float = NEVER,
) -> Load:
    """Repeat each call in its own thread, all at the same time and without a pause.

    An exception of a call ends all threads and is raised here.

    Args:
        calls: One for each thread.
        duration: Seconds after which no call starts, once each thread has made `fewest` calls.
        fewest: The least number of calls of each thread.
        now: A clock in seconds.
        deadline: The moment after which no call starts but the first of each thread.

    Returns:
        The durations of all calls.
    """
    gate = threading.Barrier(len(calls))
    stop = threading.Event()

    def repeat(call: Call) -> tuple[float, float, list[float]]:
        gate.wait()
        seconds: list[float] = []
        begun = ended = now()
        try:
            while not stop.is_set() and (
                not seconds
                or (ended < deadline and (ended - begun < duration or len(seconds) < fewest))
            ):
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
            try:
                running = [pool.submit(repeat, call) for call in calls]
                runs = [run.result() for run in running]
            finally:
                stop.set()
                gate.abort()  # some thread may wait for others that no signal let start
    begun = min(run[0] for run in runs)
    ended = max(run[1] for run in runs)
    return Load(tuple(run[2] for run in runs), ended - begun)


def midway(moment: float, deadline: float) -> float:
    """Return the moment at which half of the time until a deadline is over."""
    return (moment + deadline) / 2


def _rounded(value: float) -> float:
    """Round to three decimals, as microseconds are of milliseconds."""
    return round(float(value), 3)

"""The stages of an explanation, and a GPU's share of its time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np

from ccam_deploy.explainer import Explainer
from ccam_deploy.inputs import Images
from ccam_deploy.latency.timing import (
    FEWEST_CALLS,
    NEVER,
    WARM_CALLS,
    Clock,
    measure_load,
    midway,
)
from ccam_deploy.methods import Method

_TRANSFERS = ("upload", "download")


@dataclass(frozen=True)
class StageTimes:
    """The durations of one call.

    Attributes:
        seconds: Of each stage, by name. On a GPU the stages are the device's own, from event to
            event; where CUDA graphs replay the work, a graph is one stage.
        total: Seconds of the whole call.
    """

    seconds: dict[str, float]
    total: float

    @property
    def device(self) -> float:
        """The seconds on the device, of a call on a GPU."""
        return sum(spent for name, spent in self.seconds.items() if name != "preprocess")


@dataclass(frozen=True)
class DeviceTimes:
    """Median milliseconds of calls on preprocessed images on a GPU; see BatchLatency."""

    total: float
    without_transfers: float
    launched: float
    host: float


def measure_stages(
    explainer: Explainer,
    inputs: Sequence[Images],
    duration: float,
    now: Clock = time.perf_counter,
    deadline: float = NEVER,
    method: Method | None = None,
) -> list[StageTimes]:
    """Explain inputs over and over and time the stages, after a warm-up.

    Args:
        explainer: What is measured.
        inputs: Batches, explained one after the other.
        duration: Seconds to go on for; every input is explained FEWEST_CALLS times at least.
        now: A clock in seconds.
        deadline: See measure_load; the warm-up takes half of the time until then at most.
        method: The method; None for Collection-CAM.

    Returns:
        The durations of each call.
    """
    calls: list[StageTimes] = []
    endless = cycle(inputs)
    explain = explainer.explain if method is None else partial(explainer.explain, method=method)

    def call() -> None:
        started = now()
        result = explain(next(endless))
        calls.append(StageTimes(dict(result.timings), now() - started))

    begun = now()
    if begun < deadline:
        measure_load([call], 0, WARM_CALLS * len(inputs), now, midway(begun, deadline))
    calls.clear()
    measure_load([call], duration, FEWEST_CALLS * len(inputs), now, deadline)
    return calls


def stage_by_stage(explainer: Explainer) -> Explainer:
    """Share an explainer's engines, but launch work piece by piece so each stage can be timed.

    What engines capture by themselves they still replay: some plan anew in every other run.
    """
    if explainer.networks.slots is None:
        return explainer
    return Explainer(
        explainer.bundle,
        explainer.networks,
        explainer.precision,
        explainer.batch_size,
        cuda_graphs="engines",
    )


def device_times(replayed: Sequence[StageTimes], launched: Sequence[StageTimes]) -> DeviceTimes:
    """Compute a GPU's share of calls.

    Args:
        replayed: Calls as they are under load.
        launched: Calls whose work was launched piece by piece.

    Returns:
        Medians over the calls.
    """
    device = _median_ms([call.device for call in replayed])
    transfers = [sum(call.seconds.get(name, 0.0) for name in _TRANSFERS) for call in launched]
    return DeviceTimes(
        total=device,
        without_transfers=round(device - _median_ms(transfers), 3),
        launched=_median_ms([call.device for call in launched]),
        host=_median_ms([call.total - call.device for call in replayed]),
    )


def host_share(calls: Sequence[StageTimes], on_gpu: bool) -> float:
    """Compute the median share of a call that the host takes.

    Args:
        calls: On a GPU calls on preprocessed images, as they are under load.
        on_gpu: Whether the stages ran on a device. If not, the host's part is what Python takes
            between and around them.

    Returns:
        A share in [0, 1], rounded to four decimals.
    """
    inside = [call.device if on_gpu else sum(call.seconds.values()) for call in calls]
    shares = [1 - spent / call.total for spent, call in zip(inside, calls, strict=True)]
    return round(max(float(np.median(shares)), 0.0), 4)


def seconds_by_stage(calls: Sequence[StageTimes]) -> dict[str, list[float]]:
    """Collect the seconds of each stage, call by call; 0 where a call lacks the stage."""
    names = dict.fromkeys(name for call in calls for name in call.seconds)
    return {name: [call.seconds.get(name, 0.0) for call in calls] for name in names}


def median_stages(calls: Sequence[StageTimes]) -> dict[str, float]:
    """Compute the median milliseconds of each stage, and of "between", the time outside of all.

    Nothing is between where stages run beside each other, as pictures that are prepared ahead do.
    """
    between = [max(call.total - sum(call.seconds.values()), 0.0) for call in calls]
    seconds = {**seconds_by_stage(calls), "between": between}
    return {name: _median_ms(values) for name, values in seconds.items()}


def _median_ms(seconds: Sequence[float]) -> float:
    return round(1000 * float(np.median(seconds)), 3)

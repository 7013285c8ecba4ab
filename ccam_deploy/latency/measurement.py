"""How long explanations take, and how much of that is the classifier's own passes.

The floor is what no explanation can do without: one backbone pass, one gradient pass and the
classifier on the same masks, on the same engines. Overhead is an explanation's time over the
floor's, the median of the ratios of calls that were timed in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from statistics import median

import numpy as np
from PIL import Image

from ccam_deploy.engines.open import MOST_SLOTS
from ccam_deploy.errors import OptionError
from ccam_deploy.explainer import Explainer
from ccam_deploy.latency.cases import Case, Peer, floor_call, make_cases
from ccam_deploy.latency.conditions import CPU, clock_mhz, gpu, gpu_clocks
from ccam_deploy.latency.report import BatchLatency, ClockRange, Comparison
from ccam_deploy.latency.stages import (
    StageTimes,
    device_times,
    measure_stages,
    median_stages,
    seconds_by_stage,
    without_cuda_graphs,
)
from ccam_deploy.latency.timing import (
    FEWEST_CALLS,
    WARM_CALLS,
    Call,
    Clock,
    Load,
    measure_in_turn,
    measure_load,
    median_ratio,
    spread_within_inputs,
    summarise,
)

_STAGES_SHARE = 0.25


@dataclass(frozen=True)
class LatencySettings:
    """What is measured.

    Attributes:
        batches: Images a call; each batch size is measured by itself.
        concurrency: Threads that call the one explainer; on a GPU it needs as many slots.
        duration: Seconds of steady load for each batch size, as many of taking turns with the
            floor, and as many with each peer.
        warmup: Seconds before each batch size is measured.

    Raises:
        OptionError: A value is outside its range.
    """

    batches: tuple[int, ...] = (1,)
    concurrency: int = 1
    duration: float = 10.0
    warmup: float = 2.0

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise OptionError(f"batch is {list(self.batches)}; it must be at least 1")
        if len(set(self.batches)) != len(self.batches):
            raise OptionError(f"batch is {list(self.batches)}; give each size once")
        if not 1 <= self.concurrency <= MOST_SLOTS:
            raise OptionError(f"concurrency is {self.concurrency}; it must be 1 to {MOST_SLOTS}")
        if not 0 < self.duration < float("inf"):
            raise OptionError(f"duration is {self.duration:g}; it must be above 0 seconds")
        if not 0 <= self.warmup < float("inf"):
            raise OptionError(f"warmup is {self.warmup:g}; it must be 0 seconds or more")


def measure_latency(
    explainer: Explainer,
    pictures: Sequence[Image.Image],
    settings: LatencySettings,
    peers: Mapping[str, Peer] | None = None,
    progress: Callable[[str], None] = lambda line: None,
    now: Clock = time.perf_counter,
) -> list[BatchLatency]:
    """Measure every batch size.

    Args:
        explainer: What is measured.
        pictures: 1 to cases.MOST_IMAGES images.
        settings: Batch sizes and durations.
        peers: Other ways to explain, timed in turn with the explainer, by name.
        progress: Called with a line before each step.
        now: A clock in seconds.

    Returns:
        The figures of each batch size.

    Raises:
        OptionError: There are no or too many pictures.
        ImageError: A picture cannot be preprocessed.
        BackendError: An engine fails.
    """
    reports = []
    for batch in settings.batches:

        def say(line: str, batch: int = batch) -> None:
            progress(f"batch {batch}: {line}")

        cases = make_cases(explainer, pictures, batch)
        measuring = _Measuring(explainer, cases, settings, peers or {}, say, now)
        reports.append(measuring.run())
    return reports


@dataclass(frozen=True)
class _Measuring:
    """The measurement of one batch size; the attributes are as in measure_latency."""

    explainer: Explainer
    cases: Sequence[Case]
    settings: LatencySettings
    peers: Mapping[str, Peer]
    say: Callable[[str], None]
    now: Clock

    def run(self) -> BatchLatency:
        on_gpu = self.explainer.networks.backend != CPU
        load, clocks = self._load()
        cpu_clock = clock_mhz()
        card = gpu() if on_gpu else None
        launched, replayed = self._stages()
        device = device_times(replayed, launched) if replayed else None
        turns, compared = self._turns()
        batch = len(self.cases[0].images)
        masks = [len(case.masks) for case in self.cases]
        return BatchLatency(
            batch=batch,
            concurrency=self.settings.concurrency,
            latency_ms=summarise(load.seconds),
            explanations_per_second=round(load.rate * batch, 3),
            masked_forwards_per_second=round(load.rate * float(np.mean(masks)), 3),
            from_images_ms=summarise(turns["from_images"]),
            from_array_ms=summarise(turns["from_array"]),
            floor_ms=summarise(turns["floor"]),
            overhead=median_ratio(turns["from_array"], turns["floor"]),
            compare=compared,
            stages_ms=median_stages(launched),
            device_ms=device.total if device else None,
            without_transfers_ms=device.without_transfers if device else None,
            device_launched_ms=device.launched if device else None,
            host_ms=device.host if device else None,
            masks=masks,
            collections=self._collections(),
            cpu_clock_mhz=cpu_clock,
            gpu=card,
            gpu_clock_mhz=_clock_range(clocks),
            spreads=self._spreads(load, turns),
            samples_ms=_samples(load, turns, launched),
        )

    def _load(self) -> tuple[Load, list[float]]:
        """Measure the steady load of all threads, and a GPU's clock meanwhile, in MHz."""
        settings, count = self.settings, len(self.cases)
        self.say(f"warming up for {settings.warmup:g} s")
        _warm_slots(self.explainer, self.cases, settings.concurrency)
        calls = [
            self._each_in_turn(lambda case: self.explainer.explain(case.pictures))
            for _ in range(settings.concurrency)
        ]
        measure_load(calls, settings.warmup, WARM_CALLS * count, self.now)
        plural = "s" if settings.concurrency > 1 else ""
        self.say(f"{settings.concurrency} thread{plural} for {settings.duration:g} s")
        on_cpu = self.explainer.networks.backend == CPU
        no_clocks: list[float] = []
        with nullcontext(no_clocks) if on_cpu else gpu_clocks() as clocks:
            load = measure_load(calls, settings.duration, FEWEST_CALLS * count, self.now)
        return load, clocks

    def _stages(self) -> tuple[list[StageTimes], list[StageTimes]]:
        """Time the stages of calls on pictures; on a GPU those of replayed calls on arrays too."""
        self.say("stages")
        duration = self.settings.duration * _STAGES_SHARE
        plain = without_cuda_graphs(self.explainer)
        pictures = [case.pictures for case in self.cases]
        launched = measure_stages(plain, pictures, duration, self.now)
        if not self.explainer.networks.slots:
            return launched, []
        images = [case.images for case in self.cases]
        return launched, measure_stages(self.explainer, images, duration, self.now)

    def _turns(self) -> tuple[dict[str, list[float]], dict[str, Comparison]]:
        """Time calls in turn: the seconds of each by name, and each peer's comparison."""
        floors = cycle([floor_call(self.explainer, case) for case in self.cases])
        from_array = self._each_in_turn(lambda case: self.explainer.explain(case.images))
        calls: dict[str, Call] = {
            "from_images": self._each_in_turn(lambda case: self.explainer.explain(case.pictures)),
            "from_array": from_array,
            "floor": lambda: next(floors)(),
        }
        duration = self.settings.duration
        self.say(f"from images, from array and floor in turn for {duration:g} s")
        seconds = self._in_turn(calls)
        compared = {}
        for name, peer in self.peers.items():
            self.say(f"from array and {name} in turn for {duration:g} s")
            beside = f"from_array_beside_{name}"
            both = self._in_turn({beside: from_array, name: self._each_in_turn(peer)})
            ratio = median_ratio(both[name], both[beside])
            compared[name] = Comparison(summarise(both[name]), ratio)
            seconds |= both
        return seconds, compared

    def _in_turn(self, calls: Mapping[str, Call]) -> dict[str, list[float]]:
        count = len(self.cases)
        return measure_in_turn(
            calls,
            rounds=FEWEST_CALLS * count,
            warmup=WARM_CALLS * count,
            duration=self.settings.duration,
            now=self.now,
        )

    def _each_in_turn(self, function: Callable[[Case], object]) -> Call:
        """Make a call that takes the next case each time, over and over."""
        endless = cycle(self.cases)
        return lambda: function(next(endless))

    def _collections(self) -> dict[str, list[int]]:
        return {
            name: [count for case in self.cases for count in case.collections[name]]
            for name in self.cases[0].collections
        }

    def _spreads(self, load: Load, turns: Mapping[str, list[float]]) -> dict[str, float]:
        runs = {"latency": load.threads, **{name: (values,) for name, values in turns.items()}}
        spread = partial(spread_within_inputs, inputs=len(self.cases))
        return {name: spread(threads) for name, threads in runs.items()}


def _warm_slots(explainer: Explainer, cases: Sequence[Case], count: int) -> None:
    """On a GPU, explain every case in each of some slots until their graphs are captured.

    The slot that was given back last is lent first: it is kept away from the next calls, so that
    they open another one, which calls at the same time would do only by chance.
    """
    slots = explainer.networks.slots
    if slots is None:
        return
    with ExitStack() as kept:
        for left in reversed(range(count)):
            for case in cases:
                for _ in range(WARM_CALLS):
                    explainer.explain(case.images)
            if left:
                kept.enter_context(slots.take())


def _clock_range(clocks: Sequence[float]) -> ClockRange | None:
    return ClockRange(min(clocks), median(clocks), max(clocks)) if clocks else None


def _samples(
    load: Load, turns: Mapping[str, list[float]], stages: Sequence[StageTimes]
) -> dict[str, list[float]]:
    """Every duration in milliseconds, rounded to microseconds, by figure."""
    seconds = {"latency": load.seconds, **turns, "stages_total": [call.total for call in stages]}
    seconds |= {f"stage_{name}": values for name, values in seconds_by_stage(stages).items()}
    return {name: [round(1000 * value, 3) for value in values] for name, values in seconds.items()}

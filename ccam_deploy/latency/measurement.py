"""How long explanations take, and how much of that is the classifier's own passes.

The floor is what no explanation can do without: one backbone pass, one gradient pass and the
classifier on the same masks, on the same engines. Overhead is an explanation's time over the
floor's, the median of the ratios of calls that were timed in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from statistics import median

import numpy as np
from PIL import Image

from ccam_deploy.explainer import Explainer
from ccam_deploy.latency.cases import Case, Peer, count_cases, floor_call, make_cases
from ccam_deploy.latency.conditions import CPU, clock_mhz, gpu, gpu_clocks
from ccam_deploy.latency.report import BatchLatency, ClockRange, Comparison
from ccam_deploy.latency.settings import STAGES_SHARE, Deadlines, LatencySettings
from ccam_deploy.latency.stages import (
    StageTimes,
    device_times,
    host_share,
    measure_stages,
    median_stages,
    seconds_by_stage,
    stage_by_stage,
)
from ccam_deploy.latency.tables import digits
from ccam_deploy.latency.timing import (
    FEWEST_CALLS,
    WARM_CALLS,
    Call,
    Clock,
    Load,
    measure_in_turn,
    measure_load,
    median_ratio,
    midway,
    spread_within_inputs,
    summarise,
)


def measure_latency(
    explainer: Explainer,
    pictures: Sequence[Image.Image],
    settings: LatencySettings,
    peers: Mapping[str, Peer] | None = None,
    progress: Callable[[str], None] = lambda line: None,
    now: Clock = time.perf_counter,
) -> list[BatchLatency]:
    """Measure every batch size, each in the time that Deadlines gives it.

    On a GPU, every slot is prepared first, which takes as long as it takes.

    Args:
        explainer: What is measured.
        pictures: 1 to cases.MOST_IMAGES images.
        settings: Batch sizes and durations.
        peers: Other ways to explain, timed in turn with the explainer, by name.
        progress: Called with a line before each step, and with what it found.
        now: A clock in seconds.

    Returns:
        The figures of each batch size.

    Raises:
        OptionError: There are no or too many pictures.
        ImageError: A picture cannot be preprocessed.
        BackendError: An engine fails.
    """
    reports = []
    if explainer.on_device is not None:
        progress("preparing the GPU")
        explainer.warm_up(max(settings.batches), progress=progress)
    for batch in settings.batches:

        def say(line: str, batch: int = batch) -> None:
            progress(f"batch {batch}: {line}")

        deadlines = Deadlines.of(settings, len(peers or {}), now())
        half = midway(now(), deadlines.first_calls)
        say("first explanations")
        cases = make_cases(explainer, pictures, batch, partial(_passed, half, now))
        if len(cases) < (every := count_cases(len(pictures), batch)):
            say(f"there is time for {len(cases)} of {every} batches of images")
        measuring = _Measuring(explainer, cases, settings, peers or {}, deadlines, say, now)
        reports.append(measuring.run())
    return reports


@dataclass(frozen=True)
class _Measuring:
    """The measurement of one batch size; the attributes are as in measure_latency."""

    explainer: Explainer
    cases: Sequence[Case]
    settings: LatencySettings
    peers: Mapping[str, Peer]
    deadlines: Deadlines
    say: Callable[[str], None]
    now: Clock

    def run(self) -> BatchLatency:
        load, clocks = self._load()
        cpu_clock = clock_mhz()
        card = gpu() if self.on_gpu else None
        launched, replayed = self._stages()
        share = host_share(replayed or launched, self.on_gpu)
        self._say_stages(median_stages(launched), share)
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
            host_share=share,
            masks=masks,
            collections=self._collections(),
            cpu_clock_mhz=cpu_clock,
            gpu=card,
            gpu_clock_mhz=_clock_range(clocks),
            spreads=self._spreads(load, turns),
            samples_ms=_samples(load, turns, launched),
        )

    @property
    def on_gpu(self) -> bool:
        return self.explainer.networks.backend != CPU

    def _load(self) -> tuple[Load, list[float]]:
        """Measure the steady load of all threads, and a GPU's clock meanwhile, in MHz."""
        settings, count, deadlines = self.settings, len(self.cases), self.deadlines
        self.say(f"warming up for {settings.warmup:g} s")
        half = midway(self.now(), deadlines.load)
        measure_load(self._threads(), settings.warmup, WARM_CALLS * count, self.now, half)
        plural = "s" if settings.concurrency > 1 else ""
        self.say(f"{settings.concurrency} thread{plural} for {settings.duration:g} s")
        no_clocks: list[float] = []
        fewest = FEWEST_CALLS * count
        with gpu_clocks() if self.on_gpu else nullcontext(no_clocks) as clocks:
            load = measure_load(
                self._threads(), settings.duration, fewest, self.now, deadlines.load
            )
        timing = summarise(load.seconds)
        self.say(
            f"latency {digits(timing.median)} ms, slowest of {timing.calls} calls "
            f"{digits(timing.maximum)} ms"
        )
        return load, clocks

    def _threads(self) -> list[Call]:
        """The call of each thread; all begin with the first case."""
        return [
            self._each_in_turn(lambda case: self.explainer.explain(case.pictures))
            for _ in range(self.settings.concurrency)
        ]

    def _stages(self) -> tuple[list[StageTimes], list[StageTimes]]:
        """Time the stages of calls on pictures; on a GPU those of replayed calls on arrays too."""
        self.say("stages")
        duration = self.settings.duration * STAGES_SHARE
        plain = stage_by_stage(self.explainer)
        pictures = [case.pictures for case in self.cases]
        launched = measure_stages(plain, pictures, duration, self.now, self.deadlines.stages)
        if not self.explainer.networks.slots:
            return launched, []
        images = [case.images for case in self.cases]
        until = self.deadlines.replays
        return launched, measure_stages(self.explainer, images, duration, self.now, until)

    def _say_stages(self, stages: Mapping[str, float], share: float) -> None:
        words = ", ".join(f"{name} {digits(spent)}" for name, spent in stages.items())
        self.say(f"{words} ms; the host's share of a call {share:.1%}")

    def _turns(self) -> tuple[dict[str, list[float]], dict[str, Comparison]]:
        """Time calls in turn: the seconds of each by name, and each peer's comparison."""
        floors = cycle([floor_call(self.explainer, case) for case in self.cases])

        def from_array() -> Call:
            return self._each_in_turn(lambda case: self.explainer.explain(case.images))

        calls: dict[str, Call] = {
            "from_images": self._each_in_turn(lambda case: self.explainer.explain(case.pictures)),
            "from_array": from_array(),
            "floor": lambda: next(floors)(),
        }
        duration = self.settings.duration
        self.say(f"from images, from array and floor in turn for {duration:g} s")
        seconds = self._in_turn(calls, self.deadlines.turns)
        floor = digits(summarise(seconds["floor"]).median)
        ratio = median_ratio(seconds["from_array"], seconds["floor"])
        self.say(f"floor {floor} ms, overhead {ratio:.3f}")
        compared = {}
        for (name, peer), deadline in zip(self.peers.items(), self.deadlines.peers, strict=True):
            self.say(f"from array and {name} in turn for {duration:g} s")
            beside = f"from_array_beside_{name}"
            peer_calls = {beside: from_array(), name: self._each_in_turn(peer)}
            both = self._in_turn(peer_calls, deadline)
            ratio = median_ratio(both[name], both[beside])
            compared[name] = Comparison(summarise(both[name]), ratio)
            self.say(f"{name} {digits(compared[name].ms.median)} ms, {ratio:.2f} times as long")
            seconds |= both
        return seconds, compared

    def _in_turn(self, calls: Mapping[str, Call], deadline: float) -> dict[str, list[float]]:
        count = len(self.cases)
        return measure_in_turn(
            calls,
            rounds=FEWEST_CALLS * count,
            warmup=WARM_CALLS * count,
            duration=self.settings.duration,
            now=self.now,
            deadline=deadline,
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


def _passed(moment: float, now: Clock) -> bool:
    return now() >= moment


def _clock_range(clocks: Sequence[float]) -> ClockRange | None:
    return ClockRange(min(clocks), median(clocks), max(clocks)) if clocks else None


def _samples(
    load: Load, turns: Mapping[str, list[float]], stages: Sequence[StageTimes]
) -> dict[str, list[float]]:
    """Every duration in milliseconds, rounded to microseconds, by figure."""
    seconds = {"latency": load.seconds, **turns, "stages_total": [call.total for call in stages]}
    seconds |= {f"stage_{name}": values for name, values in seconds_by_stage(stages).items()}
    return {name: [round(1000 * value, 3) for value in values] for name, values in seconds.items()}

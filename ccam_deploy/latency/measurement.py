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

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ccam_deploy.arrays import Floats
from ccam_deploy.engines.open import MOST_SLOTS
from ccam_deploy.errors import OptionError
from ccam_deploy.explainer import Explainer, Images
from ccam_deploy.latency.conditions import CPU, clock_mhz, gpu, gpu_clocks
from ccam_deploy.latency.report import Comparison, DeviceTimes, LatencyReport
from ccam_deploy.latency.timing import (
    FEWEST_CALLS,
    Call,
    Clock,
    Load,
    measure_in_turn,
    measure_load,
    median_ratio,
    spread_of_kinds,
    summarise,
)
from ccam_deploy.methods import CollectionCAMOptions

MOST_IMAGES = 64
_STAGES_SHARE = 0.25
_WARM_CALLS = 3
_TRANSFERS = ("upload", "download")


@dataclass(frozen=True)
class LatencySettings:
    """What is measured.

    batches: how many images a call takes, one measurement each.   concurrency: how many threads
        call the one explainer; on a GPU it needs as many slots.
    duration: seconds of steady load for each batch size, as many of taking turns with the floor,
        and as many with each peer.   warmup: seconds before.
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


@dataclass(frozen=True)
class Case:
    """A batch that is explained, and what its explanation needs of the engines.

    pictures: B images.   images: [B, C, H, W] float32, the same preprocessed.
    targets: [B] int64, the classes that are explained.   logits: [B, classes] float32.
    masks: [N, H, W] float32, none of them flat.   owner: [N] int64, each one's image.
    collections: for each layer, how many it has in each image.
    """

    pictures: Sequence[Image.Image]
    images: Floats
    targets: NDArray[np.int64]
    logits: Floats
    masks: Floats
    owner: NDArray[np.int64]
    collections: Mapping[str, list[int]]


Peer = Callable[[Case], object]
"""Explains a case's preprocessed images in another way."""


@dataclass(frozen=True)
class StageTimes:
    """One call's seconds in each stage, and in all."""

    seconds: dict[str, float]
    total: float

    @property
    def device(self) -> float:
        """Of a call on a GPU: what its work took there."""
        return sum(spent for name, spent in self.seconds.items() if name != "preprocess")


def cases(explainer: Explainer, pictures: Sequence[Image.Image], batch: int) -> list[Case]:
    """Batches that together hold every picture, the last one filled up from the start.

    Raises OptionError for no or too many pictures, ImageError for one that cannot be used.
    """
    if not 1 <= len(pictures) <= MOST_IMAGES:
        raise OptionError(f"there are {len(pictures)} images; give 1 to {MOST_IMAGES}")
    endless = cycle(pictures)
    count = -(-len(pictures) // batch)
    return [_case(explainer, [next(endless) for _ in range(batch)]) for _ in range(count)]


def _case(explainer: Explainer, pictures: Sequence[Image.Image]) -> Case:
    images, _ = explainer.preprocess(pictures)
    result = explainer.explain(images)
    masks = [drawn[drawn.any(axis=(1, 2))] for drawn in result.masks]
    return Case(
        pictures,
        images,
        result.targets,
        result.logits,
        np.concatenate(masks),
        np.repeat(np.arange(len(images)), [len(kept) for kept in masks]),
        {layer.name: [int(count) for count in layer.count] for layer in result.layers},
    )


def floor_of(explainer: Explainer, case: Case) -> Call:
    """Run what no explanation of the case can do without; the masks are given.

    The classifier takes one image's masks at a time, or as many as the explainer's batch if that
    is more. On a GPU it takes them as an explanation does, and nothing is copied to or from it.
    """
    if explainer.on_device is not None:
        return explainer.on_device.passes(case.images, CollectionCAMOptions())
    networks = explainer.networks
    one_hot = np.zeros_like(case.logits)
    one_hot[np.arange(len(case.images)), case.targets] = 1
    size = max(explainer.batch_size, *np.bincount(case.owner, minlength=2).tolist())
    chunks = [slice(start, start + size) for start in range(0, len(case.masks), size)]

    def run() -> None:
        networks.gradients(networks.backbone(case.images), one_hot)
        for chunk in chunks:
            networks.masked_logits(case.images, case.masks[chunk], case.owner[chunk])

    return run


def stage_times(explainer: Explainer, images: Images, now: Clock = time.perf_counter) -> StageTimes:
    """Explain once, and time the stages.

    On a GPU the stages are the device's own, from event to event; where CUDA graphs replay the
    work, a graph is one stage.
    """
    started = now()
    result = explainer.explain(images)
    return StageTimes(dict(result.timings), now() - started)


def without_cuda_graphs(explainer: Explainer) -> Explainer:
    """The same engines, all work launched piece by piece, so that every stage can be timed."""
    if explainer.networks.slots is None:
        return explainer
    return Explainer(
        explainer.bundle,
        explainer.networks,
        explainer.precision,
        explainer.batch_size,
        cuda_graphs=False,
    )


def measure(
    explainer: Explainer,
    pictures: Sequence[Image.Image],
    settings: LatencySettings,
    peers: Mapping[str, Peer] | None = None,
    progress: Callable[[str], None] = lambda line: None,
    now: Clock = time.perf_counter,
) -> list[LatencyReport]:
    """Measure every batch size.

    peers: other ways to explain, compared in turn.   progress: called with a line for each step.

    Raises OptionError or ImageError for images that cannot be used, BackendError where an engine
    fails.
    """
    return [
        _measure(explainer, cases(explainer, pictures, batch), settings, peers or {}, progress, now)
        for batch in settings.batches
    ]


def _measure(
    explainer: Explainer,
    measured: Sequence[Case],
    settings: LatencySettings,
    peers: Mapping[str, Peer],
    progress: Callable[[str], None],
    now: Clock,
) -> LatencyReport:
    batch = len(measured[0].images)

    def say(line: str) -> None:
        progress(f"batch {batch}: {line}")

    load, clocks = _load(explainer, measured, settings, say, now)
    cpu_clock = clock_mhz()
    card = gpu() if explainer.networks.backend != CPU else None
    say("stages")
    share = settings.duration * _STAGES_SHARE
    plain = without_cuda_graphs(explainer)
    stages = _stages(plain, [case.pictures for case in measured], share, now)
    device = None
    if explainer.networks.slots:
        replayed = _stages(explainer, [case.images for case in measured], share, now)
        device = _device_times(replayed, stages)
    turns, compared = _turns(explainer, measured, settings, peers, say, now)
    masks = [len(case.masks) for case in measured]
    return LatencyReport(
        batch=batch,
        concurrency=settings.concurrency,
        latency=summarise(load.seconds),
        explanations=load.rate * batch,
        forwards=load.rate * float(np.mean(masks)),
        from_images=summarise(turns["from_images"]),
        from_array=summarise(turns["from_array"]),
        floor=summarise(turns["floor"]),
        overhead=median_ratio(turns["from_array"], turns["floor"]),
        peers=compared,
        stages=_medians(stages),
        device=device,
        masks=masks,
        collections={
            name: [count for case in measured for count in case.collections[name]]
            for name in measured[0].collections
        },
        cpu_clock=cpu_clock,
        gpu=card,
        gpu_clocks=clocks,
        spreads={
            "latency": spread_of_kinds(load.threads, len(measured)),
            **{name: spread_of_kinds([spent], len(measured)) for name, spent in turns.items()},
        },
        samples={
            "latency": _milliseconds(load.seconds),
            **{name: _milliseconds(values) for name, values in turns.items()},
            "stages_total": _milliseconds([times.total for times in stages]),
            **{f"stage_{name}": _milliseconds(spent) for name, spent in _by_name(stages).items()},
        },
    )


def _load(
    explainer: Explainer,
    measured: Sequence[Case],
    settings: LatencySettings,
    say: Callable[[str], None],
    now: Clock,
) -> tuple[Load, list[float]]:
    """The steady load of all threads, warmed up; and a GPU's clock meanwhile, in MHz."""
    threads = settings.concurrency
    say(f"warming up for {settings.warmup:g} s")
    _warm_slots(explainer, measured, threads)
    calls = [_over(measured, lambda case: explainer.explain(case.pictures)) for _ in range(threads)]
    measure_load(calls, settings.warmup, _WARM_CALLS * len(measured), now)
    say(f"{threads} thread{'s'[: threads > 1]} for {settings.duration:g} s")
    clocks: list[float] = []
    with nullcontext(clocks) if explainer.networks.backend == CPU else gpu_clocks() as clocks:
        load = measure_load(calls, settings.duration, FEWEST_CALLS * len(measured), now)
    return load, clocks


def _turns(
    explainer: Explainer,
    measured: Sequence[Case],
    settings: LatencySettings,
    peers: Mapping[str, Peer],
    say: Callable[[str], None],
    now: Clock,
) -> tuple[dict[str, list[float]], dict[str, Comparison]]:
    """Seconds of what takes turns, by name, and each peer's comparison."""
    turns = partial(
        measure_in_turn,
        rounds=FEWEST_CALLS * len(measured),
        warmup=_WARM_CALLS * len(measured),
        duration=settings.duration,
        now=now,
    )
    floors = cycle([floor_of(explainer, case) for case in measured])
    from_array = _over(measured, lambda case: explainer.explain(case.images))
    calls: dict[str, Call] = {
        "from_images": _over(measured, lambda case: explainer.explain(case.pictures)),
        "from_array": from_array,
        "floor": lambda: next(floors)(),
    }
    say(f"from images, from array and floor in turn for {settings.duration:g} s")
    seconds = turns(calls)
    compared = {}
    for name, peer in peers.items():
        say(f"from array and {name} in turn for {settings.duration:g} s")
        beside = f"from_array_beside_{name}"
        both = turns({beside: from_array, name: _over(measured, peer)})
        compared[name] = Comparison(summarise(both[name]), median_ratio(both[name], both[beside]))
        seconds |= both
    return seconds, compared


def _warm_slots(explainer: Explainer, measured: Sequence[Case], count: int) -> None:
    """On a GPU, let each of some slots explain every case until its graphs are captured.

    The slot that was given back last is lent first: it is kept away from the next calls, so that
    they open another one, which calls at the same time would do only by chance.
    """
    slots = explainer.networks.slots
    if slots is None:
        return
    with ExitStack() as kept:
        for left in reversed(range(count)):
            for case in measured:
                for _ in range(_WARM_CALLS):
                    explainer.explain(case.images)
            if left:
                kept.enter_context(slots.take())


def _over(measured: Sequence[Case], function: Callable[[Case], object]) -> Call:
    """A call that goes through the cases, one after the other, over and over."""
    endless = cycle(measured)
    return lambda: function(next(endless))


def _stages(
    explainer: Explainer, inputs: Sequence[Images], duration: float, now: Clock
) -> list[StageTimes]:
    """Every call's stages over some seconds; those that warm up are left out."""
    found: list[StageTimes] = []
    endless = cycle(inputs)

    def call() -> None:
        found.append(stage_times(explainer, next(endless), now))

    measure_load([call], 0, _WARM_CALLS * len(inputs), now)
    found.clear()
    measure_load([call], duration, FEWEST_CALLS * len(inputs), now)
    return found


def _device_times(replayed: Sequence[StageTimes], stages: Sequence[StageTimes]) -> DeviceTimes:
    """replayed: of calls as they are under load.   stages: of calls launched piece by piece."""
    device = _median([times.device for times in replayed])
    transfers = _median(
        [sum(times.seconds.get(name, 0.0) for name in _TRANSFERS) for times in stages]
    )
    return DeviceTimes(
        total=device,
        without_transfers=device - transfers,
        launched=_median([times.device for times in stages]),
        host=_median([times.total - times.device for times in replayed]),
    )


def _by_name(stages: Sequence[StageTimes]) -> dict[str, list[float]]:
    """Each stage's seconds, call by call."""
    names = dict.fromkeys(name for times in stages for name in times.seconds)
    return {name: [times.seconds.get(name, 0.0) for times in stages] for name in names}


def _medians(stages: Sequence[StageTimes]) -> dict[str, float]:
    between = [times.total - sum(times.seconds.values()) for times in stages]
    spent = {**_by_name(stages), "between": between}
    return {name: _median(values) for name, values in spent.items()}


def _median(seconds: Sequence[float]) -> float:
    return 1000 * float(np.median(seconds))


def _milliseconds(seconds: Sequence[float]) -> list[float]:
    return [round(1000 * value, 3) for value in seconds]

"""The result of a latency measurement, as it is written to JSON, and reasons to doubt it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import msgspec

from ccam_deploy.bundle.manifest import Manifest
from ccam_deploy.latency.cases import count_cases
from ccam_deploy.latency.cold_start import ColdStart
from ccam_deploy.latency.conditions import Gpu, Machine
from ccam_deploy.latency.timing import FEWEST_CALLS, Timing

WIDE = 0.1
"""An interquartile range wider than this share of the median makes a figure unreliable."""

SLOWEST = 3.0
"""A call that takes this many times the median did something that the others had not to do."""

ENOUGH_FOR_P99 = 100
BUSY = 0.5
"""Other work makes figures unreliable from a load average of this share of the cores."""

LAUNCHES = 1.2
"""Stages launched one by one that take this many times as long as the same stages replayed measure
the launches."""


class Conditions(Machine, frozen=True, kw_only=True):
    """The machine of a measurement, and how busy it was.

    Attributes:
        load_average_before: Of the last minute, before the measurement; None where unknown.
        load_average_after: The same, after it.
    """

    load_average_before: float | None
    load_average_after: float | None


class MeasuredSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a measurement.

    Attributes:
        method: The explanation method.
        options: The method's options by name, all of them.
        bundle: The bundle's name.
        backend: The engine that ran.
        precision: The graphs that ran.
        batch_size: Images, and masked images, that go through an engine at a time.
        threads: Threads inside an operator on a CPU; 0 where the engine chooses.
        concurrency: Threads that call the explainer at the same time.
        slots: Streams on a GPU; None on a CPU.
        duration_s: Seconds of each measurement.
        warmup_s: Seconds before each batch size is measured.
        compare: Names of the peers that were measured too.
        images: Paths of the images, or a note on where they come from.
    """

    method: str
    options: dict[str, Any]
    bundle: str
    backend: str
    precision: str
    batch_size: int
    threads: int
    concurrency: int
    slots: int | None
    duration_s: float
    warmup_s: float
    compare: list[str]
    images: list[str]


class MeasuredBundle(msgspec.Struct, frozen=True, kw_only=True):
    """The bundle that was measured.

    Attributes:
        name: Its name.
        input: Channels, height and width.
        layers: Names of the target layers, the shallowest first.
        random_weights: Whether the network has random weights.
        digest: SHA-256 over the hashes of its files.
    """

    name: str
    input: tuple[int, int, int]
    layers: list[str]
    random_weights: bool
    digest: str

    @classmethod
    def of(cls, manifest: Manifest) -> MeasuredBundle:
        """Take the facts from a bundle's manifest."""
        return cls(
            name=manifest.name,
            input=manifest.input,
            layers=[layer.name for layer in manifest.layers],
            random_weights=manifest.random_weights,
            digest=manifest.digest,
        )


class Comparison(msgspec.Struct, frozen=True):
    """A peer, timed in turn with the explainer on the same arrays.

    Attributes:
        ms: The peer's timing.
        ratio: How many times as long as the explainer it takes.
    """

    ms: Timing
    ratio: float


class ClockRange(msgspec.Struct, frozen=True):
    """A GPU's clock under load, in MHz."""

    minimum: float
    median: float
    maximum: float


class BatchLatency(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one batch size.

    Attributes:
        batch: Images a call.
        concurrency: Threads that called at the same time under load.
        latency_ms: Of a call from PIL images to the result, under a steady load of all threads.
        explanations_per_second: Explanations of all threads under that load.
        masked_forwards_per_second: Masked images through the classifier under that load.
        from_images_ms: Of a call from PIL images, one thread, in turn with the next two.
        from_array_ms: Of a call from the preprocessed array.
        floor_ms: Of the engines' passes alone, which no explanation can do without.
        overhead: Median over the rounds of from_array / floor.
        compare: Peers by name.
        stages_ms: Median of each stage; "between" is the time outside of all stages.
        device_ms: Time on a GPU of a call as it is under load, replayed where CUDA graphs can be
            had. None on a CPU, like the next three.
        without_transfers_ms: device_ms less upload and download.
        device_launched_ms: Sum of the stages on the GPU where each is launched by itself.
        host_ms: The rest of the call's time.
        host_share: The host's share of a call: on a GPU the rest of its time over all of it, on a
            CPU that of Python between the stages.
        masks: Masked forwards of each batch that was measured.
        collections: How many collections each layer has, image by image, by layer.
        cpu_clock_mhz: The cores' mean clock right after the load; None where unknown.
        gpu: The GPU right after the load; None on a CPU.
        gpu_clock_mhz: Its clock during the load; None where it could not be read.
        spreads: The interquartile range as a share of the median, by figure, where differences
            between images are left out.
        samples_ms: Every duration, by figure.
    """

    batch: int
    concurrency: int
    latency_ms: Timing
    explanations_per_second: float
    masked_forwards_per_second: float
    from_images_ms: Timing
    from_array_ms: Timing
    floor_ms: Timing
    overhead: float
    compare: dict[str, Comparison]
    stages_ms: dict[str, float]
    device_ms: float | None
    without_transfers_ms: float | None
    device_launched_ms: float | None
    host_ms: float | None
    host_share: float
    masks: list[int]
    collections: dict[str, list[int]]
    cpu_clock_mhz: float | None
    gpu: Gpu | None
    gpu_clock_mhz: ClockRange | None
    spreads: dict[str, float]
    samples_ms: dict[str, list[float]]


class LatencyReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `ccam-deploy bench`; its fields are the keys of the JSON file.

    Attributes:
        command: The command line that makes it again.
        conditions: Versions, machine and load.
        settings: The settings that were measured with.
        bundle: The bundle that was measured.
        cold_start: One for each batch size, unless it was left out or given up.
        batches: The figures of each batch size.
        warnings: Reasons to doubt the figures, one line each.
    """

    command: str
    conditions: Conditions
    settings: MeasuredSettings
    bundle: MeasuredBundle
    cold_start: list[ColdStart]
    batches: list[BatchLatency]
    warnings: list[str]


def doubts(batches: Sequence[BatchLatency], load: float | None, images: int = 1) -> list[str]:
    """List reasons why figures may be unreliable, one line each.

    Args:
        batches: The figures of each batch size.
        load: The machine's load average before the measurement; None where unknown.
        images: How many images there were to measure.

    Returns:
        The reasons; empty where there are none.
    """
    lines = []
    cores = os.cpu_count() or 1
    if load is not None and load > BUSY * cores:
        lines.append(
            f"the machine was busy before: load average {load:g} on {cores} cores; "
            "measure on an idle one"
        )
    for figures in batches:
        reasons = [*_cuts(figures, images), *_doubts_of_batch(figures)]
        lines += [f"batch {figures.batch}: {reason}" for reason in reasons]
    return lines


def _cuts(figures: BatchLatency, images: int) -> list[str]:
    """What there was no time for."""
    reasons = []
    measured, all_cases = len(figures.masks), count_cases(images, figures.batch)
    if measured < all_cases:
        reasons.append(
            f"there was time for {measured} of {all_cases} batches of images; give --limit"
        )
    turns = {"floor": figures.floor_ms, **{n: peer.ms for n, peer in figures.compare.items()}}
    short = [name for name, timing in turns.items() if timing.calls < FEWEST_CALLS * measured]
    if short:
        reasons.append(
            f"there was no time for {FEWEST_CALLS} turns of each batch of images with "
            f"{', '.join(short)}; give a longer --duration"
        )
    return reasons


def _doubts_of_batch(figures: BatchLatency) -> list[str]:
    reasons = []
    slow = {"latency": figures.latency_ms, "from array": figures.from_array_ms}
    slowest = [
        f"{name} {timing.maximum:.3g} of {timing.median:.3g} ms"
        for name, timing in slow.items()
        if timing.maximum > SLOWEST * timing.median
    ]
    if slowest:
        reasons.append(
            f"the slowest call took over {SLOWEST:g} times the median: {', '.join(slowest)}"
        )
    wide = [f"{name} {spread:.0%}" for name, spread in figures.spreads.items() if spread > WIDE]
    if wide:
        reasons.append(f"the middle half is wider than {WIDE:.0%} of the median: {', '.join(wide)}")
    calls = figures.latency_ms.calls
    if calls < ENOUGH_FOR_P99:
        reasons.append(
            f"p99 is of {calls} calls, fewer than {ENOUGH_FOR_P99}; give a longer --duration"
        )
    device, launched, host = figures.device_ms, figures.device_launched_ms, figures.host_ms
    if device is not None and host is not None and host > device:
        reasons.append(
            f"the host takes {host:.3f} ms beside the device's {device:.3f} ms, "
            "so the host is what was measured"
        )
    if device is not None and launched is not None and launched > LAUNCHES * device:
        reasons.append(
            f"launched one by one the stages take {launched / device:.0%} of the "
            "time that they take replayed, so they measure launches"
        )
    return reasons

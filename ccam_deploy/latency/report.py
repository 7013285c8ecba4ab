"""What a measurement of latency found, what to doubt of it, and its form as JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from ccam_deploy.latency.conditions import Gpu
from ccam_deploy.latency.timing import Timing, as_dict

WIDE = 0.1
"""A middle half wider than this share of the median makes a figure unreliable."""

ENOUGH_FOR_P99 = 100
BUSY = 0.5
"""Other work makes figures unreliable from a load average of this share of the cores."""

LAUNCHES = 1.2
"""Stages that are launched one by one, and take so many times as long as when they are replayed,
measure the launches."""


@dataclass(frozen=True)
class Comparison:
    """A peer's timing, and how many times as long it takes as the explainer on the same arrays."""

    timing: Timing
    ratio: float


@dataclass(frozen=True)
class DeviceTimes:
    """What a call on preprocessed images takes of a GPU, and of the host beside it; milliseconds.

    total: of a call as it is under load, replayed where CUDA graphs can be had.
    without_transfers: total less upload and download.
    launched: the sum of the stages where each is launched by itself.
    host: the rest of the call's time.
    """

    total: float
    without_transfers: float
    launched: float
    host: float


@dataclass(frozen=True)
class LatencyReport:
    """What was measured for one batch size.

    latency: of a call from PIL images to the result, under a steady load of all threads.
    explanations, forwards: explanations and masked forwards a second under that load.
    from_images, from_array, floor: one thread in turn; from_array leaves preprocessing out.
    overhead: from_array over floor.   peers: by name, against from_array.
    stages: milliseconds, the median over calls; "between" is what lies outside of them.
    device: on a GPU, what a call takes of it.
    masks: masked forwards a call, of each batch that was measured.   collections: of each layer.
    cpu_clock, gpu: right after the load.   gpu_clocks: during it, in MHz.
    spreads: by name, the middle half's width as a share of the median, images apart.
    samples: every duration, in milliseconds.
    """

    batch: int
    concurrency: int
    latency: Timing
    explanations: float
    forwards: float
    from_images: Timing
    from_array: Timing
    floor: Timing
    overhead: float
    peers: dict[str, Comparison]
    stages: dict[str, float]
    device: DeviceTimes | None
    masks: list[int]
    collections: dict[str, list[int]]
    cpu_clock: float | None
    gpu: Gpu | None
    gpu_clocks: list[float]
    spreads: dict[str, float]
    samples: dict[str, list[float]] = field(repr=False)


def doubts(reports: Sequence[LatencyReport], load: float | None) -> list[str]:
    """Why the figures may be unreliable, one line each.

    load: the machine's load average before the measurement.
    """
    found = []
    cores = os.cpu_count() or 1
    if load is not None and load > BUSY * cores:
        found.append(
            f"the machine was busy before: load average {load:g} on {cores} cores; "
            "measure on an idle one"
        )
    for report in reports:
        what = f"batch {report.batch}"
        wide = [f"{name} {x:.0%}" for name, x in report.spreads.items() if x > WIDE]
        if wide:
            found.append(
                f"{what}: the middle half is wider than {WIDE:.0%} of the median: {', '.join(wide)}"
            )
        if report.latency.calls < ENOUGH_FOR_P99:
            found.append(
                f"{what}: p99 is of {report.latency.calls} calls, fewer than {ENOUGH_FOR_P99}; "
                "give a longer --duration"
            )
        if report.device:
            found += [f"{what}: {line}" for line in _doubts_of_device(report.device)]
    return found


def _doubts_of_device(device: DeviceTimes) -> list[str]:
    found = []
    if device.host > device.total:
        found.append(
            f"the host takes {device.host:.3f} ms beside the device's {device.total:.3f} ms, "
            "so the host is what was measured"
        )
    if device.launched > LAUNCHES * device.total:
        found.append(
            f"launched one by one the stages take {device.launched / device.total:.0%} of the "
            "time that they take replayed, so they measure launches"
        )
    return found


def as_json(report: LatencyReport) -> dict[str, Any]:
    """A report as plain numbers, with units in the names."""

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 3)

    device = report.device
    return {
        "batch": report.batch,
        "concurrency": report.concurrency,
        "latency_ms": as_dict(report.latency),
        "explanations_per_second": rounded(report.explanations),
        "masked_forwards_per_second": rounded(report.forwards),
        "from_images_ms": as_dict(report.from_images),
        "from_array_ms": as_dict(report.from_array),
        "floor_ms": as_dict(report.floor),
        "overhead": report.overhead,
        "compare": {
            name: {"ms": as_dict(peer.timing), "ratio": peer.ratio}
            for name, peer in report.peers.items()
        },
        "stages_ms": {name: rounded(value) for name, value in report.stages.items()},
        "device_ms": rounded(device.total if device else None),
        "without_transfers_ms": rounded(device.without_transfers if device else None),
        "device_launched_ms": rounded(device.launched if device else None),
        "host_ms": rounded(device.host if device else None),
        "masks": report.masks,
        "collections": report.collections,
        "cpu_clock_mhz": report.cpu_clock,
        "gpu": asdict(report.gpu) if report.gpu else None,
        "gpu_clock_mhz": _range(report.gpu_clocks),
        "spreads": {name: rounded(value) for name, value in report.spreads.items()},
        "samples_ms": report.samples,
    }


def _range(clocks: Sequence[float]) -> dict[str, float] | None:
    if not clocks:
        return None
    return {"minimum": min(clocks), "median": median(clocks), "maximum": max(clocks)}

"""What a measurement of latency found, what to doubt of it, and its form as JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ccam_deploy.evaluate.conditions import Gpu
from ccam_deploy.evaluate.timing import Timing, as_dict

WIDE = 0.1
"""A middle half wider than this share of the median makes a figure unreliable."""

ENOUGH_FOR_P99 = 100
BUSY = 0.5
"""Other work makes figures unreliable from a load average of this share of the cores."""


@dataclass(frozen=True)
class Comparison:
    """A peer's timing, and how many times as long it takes as the explainer on the same arrays."""

    timing: Timing
    ratio: float


@dataclass(frozen=True)
class LatencyReport:
    """What was measured for one batch size.

    latency: of a call from PIL images to the result, under a steady load of all threads.
    explanations, forwards: explanations and masked forwards a second under that load.
    from_images, from_array, floor: one thread in turn; from_array leaves preprocessing out.
    overhead: from_array over floor.   peers: by name, against from_array.
    stages: milliseconds, the median over calls; "between" is what lies outside of them.
    device, host: on a GPU, milliseconds that its work took, and that the host took beside it, in
        a call as it is under load.
    masks: masked forwards a call, of each batch that was measured.   collections: of each layer.
    cpu_clock, gpu: right after the load.
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
    host: float | None
    device: float | None
    masks: list[int]
    collections: dict[str, list[int]]
    cpu_clock: float | None
    gpu: Gpu | None
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
        if report.host is not None and report.device is not None and report.host > report.device:
            found.append(
                f"{what}: the host takes {report.host:.3f} ms beside the device's "
                f"{report.device:.3f} ms, so the host is what was measured"
            )
    return found


def as_json(report: LatencyReport) -> dict[str, Any]:
    """A report as plain numbers, with units in the names."""

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 3)

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
        "host_ms": rounded(report.host),
        "device_ms": rounded(report.device),
        "masks": report.masks,
        "collections": report.collections,
        "cpu_clock_mhz": report.cpu_clock,
        "gpu": asdict(report.gpu) if report.gpu else None,
        "spreads": {name: rounded(value) for name, value in report.spreads.items()},
        "samples_ms": report.samples,
    }

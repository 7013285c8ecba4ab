"""Timing for benchmarks: repeated calls, their distribution, and the conditions they ran under."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

_PACKAGES = (
    "ccam-deploy",
    "numpy",
    "scipy",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "torchvision",
)


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


def measure_in_turn(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time several calls in turn, A B C A B C ..., so that a slow moment meets all alike.

    Returns the seconds of every call but the warm-up's, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + rounds):
        for name, call in calls.items():
            started = now()
            call()
            spent = now() - started
            if turn >= warmup:
                seconds[name].append(spent)
    return seconds


def conditions() -> dict[str, Any]:
    """Versions and machine that a result was measured with."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def as_dict(timing: Timing) -> dict[str, float]:
    """A timing as plain numbers, rounded to microseconds."""
    return {name: round(value, 3) for name, value in asdict(timing).items()}

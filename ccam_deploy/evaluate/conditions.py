"""What a measurement was made with: versions, machine, load, memory."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

_PACKAGES = (
    "ccam-deploy",
    "numpy",
    "scipy",
    "fastcluster",
    "pillow",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "numba-cuda",
    "pycuda",
    "cuda-bindings",
    "torch",
    "torchvision",
)
_GPU_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "memory.used",
    "memory.total",
    "temperature.gpu",
    "power.draw",
)
_PATIENCE = 10


@dataclass(frozen=True)
class Gpu:
    """The first GPU at a moment. clocks in MHz, memory in MiB, °C, watts; None where not readable.

    memory: what is in use, by all of its processes.
    """

    name: str
    driver: str
    clock: float | None
    max_clock: float | None
    memory_clock: float | None
    memory: float | None
    total_memory: float | None
    temperature: float | None
    power: float | None


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


def load_average() -> float | None:
    """How many processes ran or waited for a core over the last minute; None where unknown."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def clock_mhz() -> float | None:
    """The cores' mean clock now, in MHz; None where the system does not say."""
    clocks = [float(value) for value in _values(Path("/proc/cpuinfo"), "cpu MHz")]
    return round(float(np.mean(clocks)), 1) if clocks else None


def peak_memory() -> float | None:
    """The most memory that this process has held so far, in MiB; None where unknown.

    Unlike getrusage's figure it does not begin with that of the process that started this one.
    """
    for value in _values(Path("/proc/self/status"), "VmHWM"):
        return round(int(value.split()[0]) / 1024, 1)
    try:
        import resource
    except ImportError:
        return None
    unit = 2**20 if platform.system() == "Darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def gpu() -> Gpu | None:
    """The first GPU, as nvidia-smi describes it; None without a GPU or without that program."""
    query = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    words = [word.strip() for word in lines[0].split(",")] if lines else []
    if len(words) != len(_GPU_FIELDS):
        return None
    return Gpu(words[0], words[1], *map(_number, words[2:]))


def _number(word: str) -> float | None:
    """A figure of nvidia-smi, which writes [N/A] for what it cannot read."""
    try:
        return float(word)
    except ValueError:
        return None


def _processor() -> str:
    return next(iter(_values(Path("/proc/cpuinfo"), "model name")), platform.processor())


def _values(path: Path, key: str) -> list[str]:
    """The values of a key in one of the kernel's files of "key: value" lines."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    pairs = (line.partition(":") for line in lines)
    return [value.strip() for name, _, value in pairs if name.strip() == key]

"""What a measurement was made with: versions, machine, load, memory."""

from __future__ import annotations

import os
import platform
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    "clocks.max.sm",
    "clocks.mem",
    "memory.used",
    "memory.total",
    "temperature.gpu",
    "power.draw",
)
_PATIENCE = 10
_CLOCK_PERIOD = 1.0

CPU = "onnxruntime-cpu"
"""The backend that needs no GPU."""


@dataclass(frozen=True)
class Gpu:
    """The first GPU at a moment. clocks in MHz, memory in MiB, °C, watts; None where not readable.

    memory: what is in use, by all of its processes.
    """

    name: str
    driver: str
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
    words = _ask(_GPU_FIELDS)
    return Gpu(words[0], words[1], *map(_number, words[2:])) if words else None


@contextmanager
def gpu_clocks(period: float = _CLOCK_PERIOD) -> Iterator[list[float]]:
    """Sample the first GPU's clock while a block runs, into the list that the block gets.

    period: seconds between samples. In MHz; none where it cannot be read.
    """
    clocks: list[float] = []
    ended = threading.Event()

    def sample() -> None:
        while (words := _ask(("clocks.sm",))) and (clock := _number(words[0])) is not None:
            clocks.append(clock)
            if ended.wait(period):
                return

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield clocks
    finally:
        ended.set()
        sampler.join()


def _ask(fields: Sequence[str]) -> list[str]:
    """What nvidia-smi says of the GPU that is CUDA's first; nothing where it cannot say."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if not visible:
        return []
    query = [
        "nvidia-smi",
        f"--id={visible}",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = done.stdout.strip().splitlines()
    words = [word.strip() for word in lines[0].split(",")] if lines else []
    return words if len(words) == len(fields) else []


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

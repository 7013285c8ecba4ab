"""The conditions of a measurement: versions, machine, load, memory."""

from __future__ import annotations

import os
import platform
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import msgspec
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


class Gpu(msgspec.Struct, frozen=True):
    """The state of the first GPU at one moment; None for what the driver cannot read.

    Attributes:
        name: The product's name.
        driver: The driver's version.
        max_clock_mhz: The highest clock of the multiprocessors.
        memory_clock_mhz: The memory's clock now.
        memory_mib: Memory in use, by all processes together.
        total_memory_mib: Memory in all.
        temperature_celsius: Temperature of the chip.
        power_watts: Power drawn now.
    """

    name: str
    driver: str
    max_clock_mhz: float | None
    memory_clock_mhz: float | None
    memory_mib: float | None
    total_memory_mib: float | None
    temperature_celsius: float | None
    power_watts: float | None


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Versions and machine of a measurement.

    Attributes:
        python: Python's version.
        system: Operating system and architecture.
        processor: The processor's name.
        cores: How many logical cores there are; None where unknown.
        versions: Installed versions of the packages that figures depend on, by package.
    """

    python: str
    system: str
    processor: str
    cores: int | None
    versions: dict[str, str]


def machine() -> Machine:
    """Describe the machine and the installed versions."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        cores=os.cpu_count(),
        versions=versions,
    )


def load_average() -> float | None:
    """Return how many processes ran or waited over the last minute; None where unknown."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def clock_mhz() -> float | None:
    """Return the cores' mean clock now, in MHz; None where unknown."""
    clocks = [float(value) for value in _values(Path("/proc/cpuinfo"), "cpu MHz")]
    return round(float(np.mean(clocks)), 1) if clocks else None


def peak_memory() -> float | None:
    """Return the most memory that this process has held so far, in MiB; None where unknown.

    Unlike getrusage's figure, it does not include what the parent process held when it forked.
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
    """Describe the first GPU with nvidia-smi; None without a GPU or without that program."""
    words = _ask(_GPU_FIELDS)
    return Gpu(words[0], words[1], *map(_number, words[2:])) if words else None


@contextmanager
def gpu_clocks(period: float = _CLOCK_PERIOD) -> Iterator[list[float]]:
    """Sample the first GPU's clock while a block runs.

    Args:
        period: Seconds between two samples.

    Yields:
        The list that samples in MHz are added to; it stays empty where the clock is unreadable.
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
    """Query fields of CUDA's first GPU with nvidia-smi; an empty list where that fails."""
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
    except (OSError, UnicodeError, subprocess.SubprocessError):
        return []
    lines = done.stdout.strip().splitlines()
    words = [word.strip() for word in lines[0].split(",")] if lines else []
    return words if len(words) == len(fields) else []


def _number(word: str) -> float | None:
    """Read a figure of nvidia-smi; None for its [N/A] and the like."""
    try:
        return float(word)
    except ValueError:
        return None


def _processor() -> str:
    return next(iter(_values(Path("/proc/cpuinfo"), "model name")), platform.processor())


def _values(path: Path, key: str) -> list[str]:
    """List the values of a key in a file of "key: value" lines; empty where it is unreadable."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    pairs = (line.partition(":") for line in lines)
    return [value.strip() for name, _, value in pairs if name.strip() == key]

"""A cold start: how long a fresh process takes until it has explained its first batch.

`python -m ccam_deploy.latency.cold_start` is that process.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import IO, Any

import msgspec
from msgspec import UNSET, UnsetType

from ccam_deploy.errors import BackendError
from ccam_deploy.latency.conditions import CPU, Gpu, gpu, peak_memory
from ccam_deploy.latency.limited_process import limited_process

LIMIT_S = 20.0
"""Seconds after which a cold start is given up."""
_KERNELS = "ccam_deploy.kernels.cuda.kept"
"""The module that is loaded where kernels of a GPU are."""


class _Spans(msgspec.Struct, frozen=True):
    """Figures that the fresh process measures of itself; see ColdStart."""

    imports_ms: float
    load_ms: float
    first_ms: float
    second_ms: float
    peak_memory_mib: float | None
    kernels_compiled: int | UnsetType = UNSET
    kernels_found: int | UnsetType = UNSET


class ColdStart(msgspec.Struct, frozen=True, kw_only=True):
    """One cold start.

    Attributes:
        batch: Images that were explained.
        total_ms: From the start of the process to the end of its first explanation, with the image
            files in the system's cache.
        imports_ms: Importing the package.
        load_ms: Opening the bundle and its engines.
        first_ms: The first explanation.
        second_ms: The second, which finds everything in place.
        peak_memory_mib: The most memory that the process held; None where unknown.
        device_memory_mib: The memory that it took on the GPU; None on a CPU.
        kernels_compiled: How many of a GPU's kernels this process compiled; unset on a CPU.
        kernels_found: How many it found compiled, in the user's cache or in the bundle.
    """

    batch: int
    total_ms: float
    imports_ms: float
    load_ms: float
    first_ms: float
    second_ms: float
    peak_memory_mib: float | None
    device_memory_mib: float | None
    kernels_compiled: int | UnsetType = UNSET
    kernels_found: int | UnsetType = UNSET

    @property
    def kernels(self) -> str | None:
        """Whether the cache of kernels was "warm", or "cold" for some of them; None on a CPU."""
        if self.kernels_compiled is UNSET:
            return None
        return "cold" if self.kernels_compiled else "warm"


def measure_cold_start(
    bundle: Path,
    images: Sequence[Path],
    batch: int,
    load_options: Mapping[str, Any],
    limit: float = LIMIT_S,
) -> ColdStart | None:
    """Start a process that loads a bundle and explains `batch` images.

    Args:
        bundle: The bundle's folder.
        images: Image files; they are repeated where the batch is larger.
        batch: How many images are explained in one call.
        load_options: Options of `ccam_deploy.load`, with the backend.
        limit: Seconds after which the process is ended.

    Returns:
        The times and the memory of that process; None where it was ended.

    Raises:
        BackendError: The process failed; the message is its last line.
    """
    before = gpu() if load_options["backend"] != CPU else None
    job = {
        "bundle": str(bundle),
        "images": list(map(str, images)),
        "batch": batch,
        "load_options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in load_options.items()
        },
    }
    ended = _run([sys.executable, "-m", __name__, json.dumps(job)], limit, before is not None)
    if ended is None:
        return None
    if not ended.line:
        raise BackendError(f"the cold start failed: {ended.last_words}")
    return ColdStart(
        batch=batch,
        total_ms=_milliseconds(ended.until_ready),
        device_memory_mib=_memory_taken(before, ended.card),
        **msgspec.structs.asdict(msgspec.json.decode(ended.line, type=_Spans)),
    )


@dataclass(frozen=True)
class _Ended:
    """A process that has ended.

    Attributes:
        until_ready: Seconds from its start until it was ready.
        line: The figures that it printed; empty where it failed.
        card: The GPU before it ended; None where that was not asked for.
        last_words: What it wrote to stderr last, or how it ended.
    """

    until_ready: float
    line: str
    card: Gpu | None
    last_words: str


def _run(command: Sequence[str], limit: float, on_gpu: bool) -> _Ended | None:
    """Run the fresh process until it has printed its figures; None where it took too long."""
    started = time.perf_counter()
    with limited_process(command, limit) as limited:
        stdout = limited.process.stdout
        ready = _line(stdout)
        until_ready = time.perf_counter() - started
        line = _line(stdout) if ready else ""
        limited.is_done()
        card = gpu() if on_gpu else None
    if limited.expired:
        return None
    code = limited.process.returncode
    last_words = limited.last_words or f"it ended with {code}"
    return _Ended(until_ready, "" if code else line, card, last_words)


def _line(stream: IO[str] | None) -> str:
    return stream.readline().strip() if stream else ""


def _memory_taken(before: Gpu | None, after: Gpu | None) -> float | None:
    """The growth of a GPU's used memory in MiB; None where it is unknown."""
    if before is None or after is None or before.memory_mib is None or after.memory_mib is None:
        return None
    return after.memory_mib - before.memory_mib


def _kernel_counts() -> tuple[int | UnsetType, int | UnsetType]:
    """How many kernels were compiled and were found here; unset where there are none."""
    if _KERNELS not in sys.modules:
        return UNSET, UNSET
    from ccam_deploy.kernels.cuda.kept import store

    return store().compiled, store().found


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 3)


def main() -> None:
    """Explain twice, print "ready" between, then the times, and wait until stdin is closed."""
    begun = time.perf_counter()
    from ccam_deploy.explainer import load
    from ccam_deploy.image_files import load_image

    imported = time.perf_counter()
    job = json.loads(sys.argv[1])
    pictures = list(islice(cycle([load_image(file) for file in job["images"]]), job["batch"]))
    opening = time.perf_counter()
    with load(job["bundle"], **job["load_options"]) as explainer:
        opened = time.perf_counter()
        explainer.explain(pictures)
        first = time.perf_counter()
        compiled, found = _kernel_counts()
        print("ready", flush=True)
        again = time.perf_counter()
        explainer.explain(pictures)
        second = time.perf_counter()
        spans = _Spans(
            imports_ms=_milliseconds(imported - begun),
            load_ms=_milliseconds(opened - opening),
            first_ms=_milliseconds(first - opened),
            second_ms=_milliseconds(second - again),
            kernels_compiled=compiled,
            kernels_found=found,
            peak_memory_mib=peak_memory(),
        )
        print(msgspec.json.encode(spans).decode(), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()

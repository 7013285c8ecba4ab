"""A cold start: how long a fresh process takes until it has explained its first batch.

Run as `python -m ccam_deploy.latency.cold_start`, it is that process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import IO, Any

from ccam_deploy.errors import BackendError
from ccam_deploy.latency.conditions import CPU, gpu, peak_memory


@dataclass(frozen=True)
class ColdStart:
    """One cold start. total, imports, load, first, second: milliseconds.

    total: from the start of the process to the end of its first explanation, images read from
        files that the system has at hand.
    imports, load: importing the package; opening bundle and engines.
    first, second: the first explanation, and the second, which finds everything in place.
    peak_memory: the most that the process held, in MiB; None where the system does not say.
    device_memory: what it took of the GPU's memory, in MiB; None on a CPU.
    """

    batch: int
    total: float
    imports: float
    load: float
    first: float
    second: float
    peak_memory: float | None
    device_memory: float | None


def measure(bundle: Path, images: Sequence[Path], batch: int, how: Mapping[str, Any]) -> ColdStart:
    """Start a process, load the bundle in it and explain `batch` images, over and over the same.

    how: backend, precision, batch_size and threads, as `ccam_deploy.load` takes them.
    Raises BackendError with what went wrong in that process.
    """
    before = gpu() if how["backend"] != CPU else None
    job = {"bundle": str(bundle), "images": list(map(str, images)), "batch": batch, "how": how}
    command = [sys.executable, "-m", __name__, json.dumps(job)]
    started = time.perf_counter()
    # Its errors go to a file: a pipe that is only read in the end would block it when full.
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            ready = _line(process.stdout)
            total = time.perf_counter() - started
            line = _line(process.stdout) if ready else ""
            after = gpu() if before else None
            process.communicate()
        except BaseException:
            process.kill()
            raise
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if process.returncode or not line:
        last = said[-1:] or [f"it ended with {process.returncode}"]
        raise BackendError(f"the cold start failed: {last[0]}")
    taken = None
    if before and after and before.memory is not None and after.memory is not None:
        taken = after.memory - before.memory
    return ColdStart(
        batch=batch, total=round(total * 1000, 3), device_memory=taken, **json.loads(line)
    )


def _line(stream: IO[str] | None) -> str:
    return stream.readline().strip() if stream else ""


def as_json(start: ColdStart) -> dict[str, float | None]:
    """A cold start as plain numbers, with units in the names."""
    units = {"peak_memory": "_mib", "device_memory": "_mib", "batch": ""}
    return {f"{name}{units.get(name, '_ms')}": value for name, value in asdict(start).items()}


def main() -> None:
    """Explain twice, saying so after the first time; print the times, and wait to be let go."""
    begun = time.perf_counter()
    from ccam_deploy.explainer import load
    from ccam_deploy.image_files import load_image

    imported = time.perf_counter()
    job = json.loads(sys.argv[1])
    pictures = list(islice(cycle([load_image(file) for file in job["images"]]), job["batch"]))
    opening = time.perf_counter()
    with load(job["bundle"], **job["how"]) as explainer:
        opened = time.perf_counter()
        explainer.explain(pictures)
        first = time.perf_counter()
        print("ready", flush=True)
        again = time.perf_counter()
        explainer.explain(pictures)
        second = time.perf_counter()
        spans = {
            "imports": imported - begun,
            "load": opened - opening,
            "first": first - opened,
            "second": second - again,
        }
        found: dict[str, float | None] = {k: round(1000 * spent, 3) for k, spent in spans.items()}
        print(json.dumps({**found, "peak_memory": peak_memory()}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()

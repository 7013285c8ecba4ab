"""How much of the processes' time a batch on Ray uses, beside explainers without Ray.

    python -m bench.bench_batch --output bench/results/batch-cpu.json

Copies of a photograph are explained with ResNet-18 and random weights, in turn by

- batch: `ccam-deploy batch --processes N`, which decodes, explains and writes Parquet
- side by side: N processes that each decode and explain their share, and write nothing

with one thread each. The rate of either counts from the moment that the first process has loaded
the bundle to the end of the last one's work, so that the start of Ray is left out; it stands beside
the rates as seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import harness
from ccam_deploy.latency.conditions import CPU
from ccam_deploy.text import markdown_table

NETWORK = "resnet18"
_BATCH_SIZE = 16
_PART_SIZE = 8


def share(bundle: Path, files: Sequence[Path], begin: Any) -> tuple[float, float]:
    """Explain some files in this process.

    Args:
        bundle: The bundle's folder.
        files: Image files.
        begin: A barrier where all processes wait once they have loaded the bundle.

    Returns:
        When the work began and ended, in seconds since the epoch.
    """
    import ccam_deploy as ccam
    from ccam_deploy.engines.base import row_chunks
    from ccam_deploy.image_files import load_image

    with ccam.load(bundle, backend=CPU, threads=1, batch_size=_BATCH_SIZE) as explainer:
        begin.wait()
        began = time.time()
        for rows in row_chunks(len(files), _PART_SIZE):
            explainer.explain([load_image(file) for file in files[rows]])
        return began, time.time()


def side_by_side(bundle: Path, files: Sequence[Path], processes: int) -> float:
    """Measure explainers without Ray; return images a second."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(processes) as pool:
        begin = manager.Barrier(processes)
        shares = [(bundle, files[number::processes], begin) for number in range(processes)]
        spans = pool.starmap(share, shares, chunksize=1)
    return rate(len(files), spans)


def rate(images: int, spans: Sequence[tuple[float, float]]) -> float:
    """Images a second, from the first beginning to the last end."""
    return images / (max(end for _, end in spans) - min(began for began, _ in spans))


def batch(bundle: Path, images: Path, processes: int) -> dict[str, float]:
    """Measure a run of the command; return images a second, and the seconds of all of it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ccam_deploy", "batch", bundle, images, f"{folder}/out"]
        command += ["--processes", processes, "--threads", 1, "--backend", CPU, "--json"]
        command += ["--part-size", _PART_SIZE, "--batch-size", _BATCH_SIZE]
        began = time.monotonic()
        facts = json.loads(harness.run([str(word) for word in command]))
        return {
            "images_per_second": facts["images_per_second"],
            "seconds": time.monotonic() - began,
        }


def measure(bundle: Path, images: int, processes: int, rounds: int) -> dict[str, Any]:
    """Run both in turn."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        files = [place / f"{number:05}.jpg" for number in range(images)]
        for file in files:
            shutil.copy(harness.PHOTOGRAPH, file)
        with_ray, without = [], []
        for _ in range(rounds):
            without.append(side_by_side(bundle, files, processes))
            with_ray.append(batch(bundle, place, processes))
    rates = [run["images_per_second"] for run in with_ray]
    return {
        "images": images,
        "processes": processes,
        "batch_per_second": rates,
        "side_by_side_per_second": without,
        "ratio": statistics.median(rates) / statistics.median(without),
        "batch_seconds": [run["seconds"] for run in with_ray],
    }


def table(results: Mapping[str, Any]) -> str:
    """Lay out a result as Markdown."""
    header = (
        "processes",
        "images",
        "batch, images/s",
        "side by side, images/s",
        "ratio",
        "seconds of the command",
    )
    row = (
        str(results["processes"]),
        str(results["images"]),
        _spread(results["batch_per_second"]),
        _spread(results["side_by_side_per_second"]),
        f"{results['ratio']:.3f}",
        f"{statistics.median(results['batch_seconds']):.1f}",
    )
    return markdown_table(header, [row])


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def markdown(result: Mapping[str, Any]) -> str:
    """The table, the machine, and the command that makes it."""
    device = harness.device_line(result["conditions"])
    return (
        f"{table(result['results'])}\n\nMedians, with the lowest and the highest. {NETWORK}, "
        f"random weights, {device}, one thread for each process.\nMade by `{result['command']}`.\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often both are run")
    parser.add_argument("--images", type=int, default=96, help="photographs of a run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--bundle", type=Path, help="a bundle, instead of exporting one")
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle or harness.export(
            NETWORK, Path(folder) / NETWORK, "--random-weights"
        )
        results = measure(bundle, options.images, options.processes, options.rounds)
    print(table(results))
    if options.output:
        words = {name: getattr(options, name) for name in ("rounds", "images", "processes")}
        command = harness.command_line("bench.bench_batch", {**words, "output": options.output})
        conditions = harness.conditions()
        result = {"command": command, "conditions": conditions, "results": results}
        harness.write_results(options.output, result, markdown(result))


if __name__ == "__main__":
    main()

"""The paper's Table 2: the time of one explanation, by method, network and size of the input.

    python -m bench.bench_table2 --output bench/results
    python -m bench.bench_table2 --backend tensorrt --precision fp16 --output bench/results

Networks with random weights, one image, from the preprocessed array to the map, on the best
backend that works here without plans, or on the one that is named; for TensorRT plans are built.
The results go to table2-BACKEND, with -PRECISION where that is not fp32. The methods are those
that this package has. All methods of a network and size are timed in turn, and their ratio to
Collection-CAM is the median of the ratios round by round. The paper's figures, of an RTX 3080,
stand beside: their ratios compare, their times do not.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from msgspec.structs import asdict

import ccam_deploy as ccam
from bench import harness
from ccam_deploy.bundle.manifest import PrecisionName
from ccam_deploy.engines import Backend
from ccam_deploy.image_files import load_image
from ccam_deploy.latency.cases import make_cases
from ccam_deploy.latency.conditions import load_average
from ccam_deploy.latency.timing import measure_in_turn, median_ratio, summarise
from ccam_deploy.methods import DEFAULT_METHOD, METHODS
from ccam_deploy.quality.variants import make_variants, runnable
from ccam_deploy.text import markdown_table

NETWORKS = ("resnet18", "resnet101", "vgg19")
SIZES = (224, 256)
_BATCH_SIZE = 32
_WARM_ROUNDS = 3

_COLUMNS = ("grad-cam", "grad-cam++", "layer-cam", "score-cam", "rise", "collection-cam")
_TIMES = {
    ("resnet18", 224): (13.10, 13.72, 15.73, 1176.12, 16328.82, 54.15),
    ("resnet18", 256): (12.96, 13.69, 15.46, 1466.22, 22171.15, 59.83),
    ("resnet101", 224): (62.23, 62.21, 66.55, 20584.98, 26865.53, 322.59),
    ("resnet101", 256): (58.86, 59.09, 63.43, 20320.01, 34880.05, 350.55),
    ("vgg19", 224): (18.83, 18.16, 18.05, 1649.61, 28003.38, 92.63),
    ("vgg19", 256): (20.22, 21.04, 22.44, 2020.42, 40003.17, 111.38),
}
PAPER = {place: dict(zip(_COLUMNS, times, strict=True)) for place, times in _TIMES.items()}
"""Milliseconds of Table 2 (Ha & Youn 2022), on an NVIDIA RTX 3080."""


_HEADER = (
    "network",
    "input",
    "method",
    "median, ms",
    "p95, ms",
    "spread",
    "over collection-cam",
    "paper, ms (RTX 3080)",
    "paper, over collection-cam",
)


def method_names() -> list[str]:
    """List the methods that this package has, Collection-CAM first."""
    return sorted(METHODS, key=lambda name: (name != DEFAULT_METHOD, name))


def measure(
    folder: Path,
    rounds: int,
    duration: float,
    backend: Backend = "auto",
    precision: PrecisionName = "fp32",
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """Time methods, by default every one, on one bundle; called in a process of its own."""
    with ccam.load(
        folder, backend=backend, precision=precision, batch_size=_BATCH_SIZE
    ) as explainer:
        (case,) = make_cases(explainer, [load_image(harness.PHOTOGRAPH)], batch=1)
        variants, reasons = runnable(explainer, make_variants(names or method_names()))
        calls = {
            variant.name: partial(explainer.explain, case.images, method=variant.method)
            for variant in variants
        }
        before = load_average()
        seconds = measure_in_turn(calls, rounds, _WARM_ROUNDS, duration)
        return {
            "backend": explainer.networks.backend,
            "precision": precision,
            "load_average": [before, load_average()],
            "masks": len(case.masks),
            "methods": {
                name: {
                    "ms": asdict(summarise(seconds[name])),
                    "ratio": median_ratio(seconds[name], seconds[DEFAULT_METHOD]),
                }
                for name in calls
            },
            "refused": reasons,
        }


def table(results: Mapping[str, Any]) -> str:
    """Lay out results as Markdown, a row for each network, size and method."""
    rows = []
    for place, figures in results.items():
        network, size = place.split("-")
        paper = PAPER.get((network, int(size)), {})
        for name, timing in figures["methods"].items():
            ms = timing["ms"]
            paper_ms, paper_base = paper.get(name), paper.get(DEFAULT_METHOD)
            beside = ("-", "-")
            if paper_ms is not None and paper_base is not None:
                beside = (f"{paper_ms:.2f}", f"{paper_ms / paper_base:.2f}")
            rows.append(
                (
                    network,
                    f"{size}×{size}",
                    name,
                    f"{ms['median']:.1f}",
                    f"{ms['p95']:.1f}",
                    f"{ms['spread']:.0%}",
                    f"{timing['ratio']:.2f}",
                    *beside,
                )
            )
    return markdown_table(_HEADER, rows)


def report(results: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Put results beside the command that made them, and what they were made on."""
    return {
        "command": command,
        "conditions": harness.conditions(with_gpu=True),
        "weights": "random",
        "results": results,
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The table, and under it the conditions in a few words."""
    results = result["results"]
    backends = ", ".join(sorted({figures["backend"] for figures in results.values()}))
    precisions = ", ".join(sorted({figures["precision"] for figures in results.values()}))
    loads = [figures["load_average"][0] for figures in results.values()]
    known = [load for load in loads if load is not None]
    busy = f"{min(known):g} to {max(known):g}" if known else "unknown"
    return (
        f"{table(results)}\n\n"
        f"{harness.device_line(result['conditions'])}, {backends}, {precisions}, random weights, "
        f"one image, from the preprocessed array. Load average before each measurement: {busy}.\n"
        f"Made by `{result['command']}`.\n"
    )


def file_name(results: Mapping[str, Any]) -> str:
    """Name a file of results after the backend and precision that they have in common."""
    ((backend, precision),) = {
        (figures["backend"], figures["precision"]) for figures in results.values()
    }
    return f"table2-{backend}.json" if precision == "fp32" else f"table2-{backend}-{precision}.json"


def export_options(size: str, precision: str) -> list[str]:
    """The options with which a network is exported for all methods."""
    words = ["--random-weights", "--input-size", size, "--precision", precision]
    return [*words, "--head", "--gradients"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__, rounds=5, networks=NETWORKS)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--methods", default=",".join(method_names()))
    parser.add_argument("--duration", type=float, default=10.0, help="seconds, at least")
    parser.add_argument("--backend", default="auto", choices=get_args(Backend))
    parser.add_argument("--precision", default="fp32", choices=get_args(PrecisionName))
    options = parser.parse_args(arguments)
    engine = (options.backend, options.precision)
    if options.bundle:
        names = options.methods.split(",")
        figures = measure(options.bundle, options.rounds, options.duration, *engine, names)
        print(json.dumps(figures))
        return
    shared = {
        "rounds": options.rounds,
        "duration": f"{options.duration:g}",
        "backend": options.backend,
        "precision": options.precision,
        "methods": options.methods,
    }
    results = {}
    for network in options.networks.split(","):
        for size in options.sizes.split(","):
            place = f"{network}-{size}"
            with tempfile.TemporaryDirectory() as folder:
                words = export_options(size, options.precision)
                bundle = Path(folder) / network
                harness.export(network, bundle, *words, backend=options.backend)
                results[place] = harness.measure_in_process(
                    "bench.bench_table2", {"bundle": bundle, **shared}
                )
            print(table({place: results[place]}), flush=True)
    if options.output:
        command = harness.command_line(
            "bench.bench_table2",
            {
                "networks": options.networks,
                "sizes": options.sizes,
                **shared,
                "output": options.output,
            },
        )
        result = report(results, command)
        harness.write_results(options.output / file_name(results), result, markdown(result))


if __name__ == "__main__":
    main()

"""What a method costs beyond the forward passes that it asks for, on ONNX Runtime and the CPU.

    python -m bench.bench_forwards --output bench/results

For each network with random weights at 224×224, one image, timed in turn:

- explain: the whole explanation by a method, from the preprocessed image to the saliency map
- forwards: the same runs of the same engines on the same arrays, and nothing else

The overhead is the median of their ratios round by round. The arrays stay in memory for the runs
that are repeated: the masks of Score-CAM on ResNet-18 take 100 MB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import asdict
from numpy.typing import NDArray

import ccam_deploy as ccam
from bench import harness
from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Engine, Networks, TensorSpec
from ccam_deploy.explainer import DEFAULT_BATCH, Explainer
from ccam_deploy.image_files import load_image
from ccam_deploy.latency.conditions import CPU, load_average
from ccam_deploy.latency.timing import measure_in_turn, median_ratio, summarise
from ccam_deploy.methods import METHODS, make_method
from ccam_deploy.text import markdown_table

Array = NDArray[Any]
Runs = list[tuple[Engine, Mapping[str, Array]]]

_EXPORTED_WITH = ("--random-weights", "--head", "--gradients")
_HEADER = (
    "network",
    "method",
    "masked images",
    "explain, ms",
    "forwards, ms",
    "overhead",
    "spread",
)


class Recorder(Engine):
    """Passes its runs on to another engine, and adds them to a list."""

    def __init__(self, engine: Engine, runs: Runs) -> None:
        self._engine = engine
        self._runs = runs
        super().__init__()

    def _load_impl(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        return self._engine.inputs, self._engine.outputs

    def _run_impl(self, feeds: Mapping[str, Array]) -> list[Array]:
        self._runs.append((self._engine, feeds))
        return list(self._engine.run(feeds).values())

    def _close_impl(self) -> None:
        pass


def record_runs(explainer: Explainer, images: Floats, method: str) -> Runs:
    """Explain once, and return the runs of the engines that it took."""
    runs: Runs = []
    networks = Networks(
        {name: Recorder(engine, runs) for name, engine in explainer.networks.engines.items()},
        explainer.bundle.precision(explainer.precision).gradient_scale,
        explainer.networks.backend,
    )
    same = Explainer(explainer.bundle, networks, explainer.precision, explainer.batch_size)
    same.explain(images, method=method)
    return runs


def measure(explainer: Explainer, images: Floats, method: str, rounds: int) -> dict[str, Any]:
    """Time a method on preprocessed images [B, C, H, W] against its own runs of the engines."""
    runs = record_runs(explainer, images, method)
    stages: list[dict[str, float]] = []

    def explain() -> None:
        stages.append(explainer.explain(images, method=method).timings)

    def forwards() -> None:
        for engine, feeds in runs:
            engine.run(feeds)

    before = load_average()
    seconds = measure_in_turn({"explain": explain, "forwards": forwards}, rounds)
    return {
        "runs": len(runs),
        "masked_images": sum(len(feeds["owner"]) for _, feeds in runs if "owner" in feeds),
        "explain_ms": asdict(summarise(seconds["explain"])),
        "forwards_ms": asdict(summarise(seconds["forwards"])),
        "overhead": median_ratio(seconds["explain"], seconds["forwards"]),
        "stages_ms": {
            name: round(1000 * float(np.median([times[name] for times in stages])), 2)
            for name in stages[0]
        },
        "load_average": [before, load_average()],
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out results as Markdown, a row for each network and method."""
    rows = []
    for network, figures_by_method in results.items():
        for method, figures in figures_by_method.items():
            explain, forwards = figures["explain_ms"], figures["forwards_ms"]
            rows.append(
                (
                    network,
                    method,
                    str(figures["masked_images"]),
                    f"{explain['median']:.0f}",
                    f"{forwards['median']:.0f}",
                    f"{figures['overhead']:.3f}",
                    f"{max(explain['spread'], forwards['spread']):.0%}",
                )
            )
    return markdown_table(_HEADER, rows)


def markdown(result: Mapping[str, Any]) -> str:
    """The table, and the command that makes it."""
    return f"{table(result['results'])}\n\nMade by `{result['command']}`.\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__, rounds=7, networks=["resnet18"])
    parser.add_argument("--methods", default="score-cam", help=", ".join(METHODS))
    parser.add_argument("--batch-size", type=int, default=DEFAULT_BATCH)
    parser.add_argument("--threads", type=int, default=0, help="0 lets ONNX Runtime choose")
    options = parser.parse_args(arguments)
    methods = [make_method(name).name for name in options.methods.split(",")]
    engine = {"backend": CPU, "batch_size": options.batch_size, "threads": options.threads}
    results: dict[str, dict[str, Any]] = {}
    for network in options.networks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            bundle = harness.export(network, Path(folder) / network, *_EXPORTED_WITH)
            with ccam.load(bundle, **engine) as explainer:
                images, _ = explainer.preprocess([load_image(harness.PHOTOGRAPH)])
                results[network] = {}
                for method in methods:
                    figures = measure(explainer, images, method, options.rounds)
                    results[network][method] = figures
                    print(table({network: {method: figures}}), flush=True)
    if options.output:
        words = {
            "networks": options.networks,
            "methods": options.methods,
            "rounds": options.rounds,
            "batch-size": options.batch_size,
            "threads": options.threads,
            "output": options.output,
        }
        result = {
            "command": harness.command_line("bench.bench_forwards", words),
            "conditions": harness.conditions(),
            "weights": "random",
            "results": results,
        }
        harness.write_results(options.output / "forwards-cpu.json", result, markdown(result))


if __name__ == "__main__":
    main()

"""What a method costs beyond the forward passes that it asks for, on ONNX Runtime and the CPU.

    python -m bench.bench_forwards --output bench/results

For each network with random weights at 224×224, one image, timed in turn:

- explain: the whole explanation by a method, from the preprocessed image to the saliency map
- forwards: the same runs of the same engines on the same arrays, and nothing else

The overhead is the median of their ratios round by round. The arrays are kept in memory to be run
again: the masks of Score-CAM on ResNet-18 are 100 MB.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import asdict
from numpy.typing import NDArray

import ccam_deploy as ccam
from bench.bench_table2 import COMMAND_LINE, run
from ccam_deploy.engines import Engine, Networks, TensorSpec
from ccam_deploy.explainer import DEFAULT_BATCH, Explainer
from ccam_deploy.image_files import load_image
from ccam_deploy.latency.conditions import CPU, load_average, machine
from ccam_deploy.latency.timing import measure_in_turn, median_ratio, summarise
from ccam_deploy.methods import METHODS, method_named

Array = NDArray[Any]
Runs = list[tuple[Engine, Mapping[str, Array]]]

ROOT = Path(__file__).parents[1]
_PHOTOGRAPH = ROOT / "ccam_deploy" / "examples" / "photographs" / "flower.jpg"


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


def recorded(explainer: Explainer, images: Array, method: str) -> Runs:
    """The runs of the engines that an explanation makes."""
    runs: Runs = []
    networks = Networks(
        {name: Recorder(engine, runs) for name, engine in explainer.networks.engines.items()},
        explainer.bundle.precision(explainer.precision).gradient_scale,
        explainer.networks.backend,
    )
    same = Explainer(explainer.bundle, networks, explainer.precision, explainer.batch_size)
    same.explain(images, method=method)
    return runs


def measure(explainer: Explainer, images: Array, method: str, rounds: int) -> dict[str, Any]:
    """Time a method on preprocessed images against its own runs of the engines."""
    runs = recorded(explainer, images, method)
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
    """The results as Markdown, a row for each network and method."""
    lines = [
        "| network | method | masked images | explain, ms | forwards, ms | overhead | spread |",
        "|---|---|---|---|---|---|---|",
    ]
    for network, measured in results.items():
        for method, found in measured.items():
            explain, forwards = found["explain_ms"], found["forwards_ms"]
            lines.append(
                f"| {network} | {method} | {found['masked_images']} | {explain['median']:.0f} "
                f"| {forwards['median']:.0f} | {found['overhead']:.3f} "
                f"| {max(explain['spread'], forwards['spread']):.0%} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="resnet18")
    parser.add_argument("--methods", default="score-cam", help=", ".join(METHODS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=DEFAULT_BATCH)
    parser.add_argument("--threads", type=int, default=0, help="0 lets ONNX Runtime choose")
    parser.add_argument("--output", type=Path, help="a folder")
    given = parser.parse_args(arguments)
    methods = [method_named(name).name for name in given.methods.split(",")]
    results: dict[str, dict[str, Any]] = {}
    for network in given.networks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder) / network
            _export(network, bundle)
            with ccam.load(
                bundle, backend=CPU, batch_size=given.batch_size, threads=given.threads
            ) as explainer:
                images, _ = explainer.preprocess([load_image(_PHOTOGRAPH)])
                results[network] = {}
                for method in methods:
                    found = measure(explainer, images, method, given.rounds)
                    results[network][method] = found
                    print(table({network: {method: found}}), flush=True)
    if given.output:
        words = ["--networks", given.networks, "--methods", given.methods]
        words += ["--rounds", given.rounds, "--batch-size", given.batch_size]
        words += ["--threads", given.threads, "--output", given.output]
        command = shlex.join(["python", "-m", "bench.bench_forwards", *map(str, words)])
        report = {
            "command": command,
            "conditions": asdict(machine()),
            "weights": "random",
            "results": results,
        }
        given.output.mkdir(parents=True, exist_ok=True)
        file = given.output / "forwards-cpu.json"
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        text = f"{table(results)}\n\nMade by `{command}`.\n"
        file.with_suffix(".md").write_text(text, encoding="utf-8")


def _export(network: str, folder: Path) -> None:
    """Export in a process of its own, so that PyTorch's threads are not in the one that measures.

    Where it fails this process ends too, after what it said.
    """
    recipe = ROOT / "export" / f"{network}.toml"
    words = ["export", "--recipe", recipe, "--random-weights", "--head", "--gradients"]
    run([sys.executable, "-c", COMMAND_LINE, *map(str, words), "--output", str(folder)])


if __name__ == "__main__":
    main()

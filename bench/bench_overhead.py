"""What an explanation costs beyond its forward passes, on ONNX Runtime and the CPU.

    python -m bench.bench_overhead --output bench/results/overhead-cpu.json

For each network with random weights at 224×224, one image, timed in turn:

- explain: the whole explanation, from the preprocessed image to the saliency map
- floor: backbone + gradient + one classifier batch of the same masks, on the same sessions
- pytorch: the same explanation in plain PyTorch with hooks and one forward per mask

Each network is exported and run in a process of its own; the peak memory is that of a process
that explains only, read before PyTorch is loaded into it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import asdict

import ccam_deploy as ccam
from bench import harness
from ccam_deploy.arrays import Floats
from ccam_deploy.explainer import Explainer
from ccam_deploy.image_files import load_image
from ccam_deploy.latency.cases import floor_call, make_cases
from ccam_deploy.latency.conditions import CPU, peak_memory
from ccam_deploy.latency.timing import measure_in_turn, median_ratio, summarise
from ccam_deploy.text import markdown_table

NETWORKS = ("resnet18", "resnet101", "vgg19")
_BATCH_SIZE = 32
_HEADER = (
    "network",
    "masks",
    "explain, ms",
    "floor, ms",
    "overhead",
    "peak, MiB",
    "PyTorch, ms",
    "speed-up",
)


def measure(folder: Path, network: str, rounds: int) -> dict[str, Any]:
    """Time one network's bundle; called in a process of its own."""
    with ccam.load(folder, backend=CPU, batch_size=_BATCH_SIZE) as explainer:
        (case,) = make_cases(explainer, [load_image(harness.PHOTOGRAPH)], batch=1)
        peak = peak_memory()
        stages: list[dict[str, float]] = []
        calls = {
            "explain": lambda: stages.append(explainer.explain(case.images).timings),
            "floor": floor_call(explainer, case),
            "pytorch": _in_pytorch(explainer, case.images, int(case.targets[0]), network),
        }
        seconds = measure_in_turn(calls, rounds)
    return {
        "masks": sum(sum(counts) for counts in case.collections.values()),
        "masks_run": len(case.masks),
        **{f"{name}_ms": asdict(summarise(durations)) for name, durations in seconds.items()},
        "overhead": median_ratio(seconds["explain"], seconds["floor"]),
        "speedup_over_pytorch": median_ratio(seconds["pytorch"], seconds["explain"]),
        "peak_memory_mib": peak,
        "stages_ms": {
            name: round(1000 * float(np.median([times[name] for times in stages])), 2)
            for name in stages[0]
        },
    }


def _in_pytorch(
    explainer: Explainer, images: Floats, target: int, network: str
) -> Callable[[], object]:
    import torch

    from ccam_deploy.export.recipe import random_model, read_recipe
    from ccam_deploy.latency import plain_pytorch

    manifest = explainer.bundle.manifest
    layers = [layer.name for layer in manifest.layers]
    model = random_model(read_recipe(harness.recipe_path(network)))
    peer = plain_pytorch.of_model(model, layers, manifest.input)
    image = torch.from_numpy(images[0].copy())
    return lambda: peer.explain(image, target)


def table(results: Mapping[str, Any]) -> str:
    """Lay out results as Markdown, a row for each network."""
    rows = [
        (
            network,
            str(figures["masks"]),
            f"{figures['explain_ms']['median']:.0f}",
            f"{figures['floor_ms']['median']:.0f}",
            f"{figures['overhead']:.3f}",
            f"{figures['peak_memory_mib']:.0f}",
            f"{figures['pytorch_ms']['median']:.0f}",
            f"{figures['speedup_over_pytorch']:.2f}",
        )
        for network, figures in results.items()
    ]
    return markdown_table(_HEADER, rows)


def markdown(result: Mapping[str, Any]) -> str:
    """The table, the machine, and the command that makes it."""
    device = harness.device_line(result["conditions"])
    return (
        f"{table(result['results'])}\n\n{device}, random weights, one image.\n"
        f"Made by `{result['command']}`.\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__, rounds=7, networks=NETWORKS, output="a JSON file")
    options = parser.parse_args(arguments)
    if options.bundle:
        print(json.dumps(measure(options.bundle, options.networks, options.rounds)))
        return
    results = {}
    for network in options.networks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            bundle = harness.export(network, Path(folder) / network, "--random-weights")
            words = {"networks": network, "bundle": bundle, "rounds": options.rounds}
            results[network] = harness.measure_in_process("bench.bench_overhead", words)
        print(table({network: results[network]}), flush=True)
    if options.output:
        result = harness.describe_run("bench.bench_overhead", options, results)
        harness.write_results(options.output, result, markdown(result))


if __name__ == "__main__":
    main()

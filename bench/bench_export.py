"""How long `ccam-deploy export` takes, beside PyTorch's own export to ONNX of the same network.

    python -m bench.bench_export --output bench/results/export-cpu.json

For each recipe, in turn and in processes of their own, imports included:

- export: `ccam-deploy export` with random weights, which traces, differentiates and converts the
  network, explains eight images with PyTorch, and checks the graphs against that
- bare: `torch.onnx.export(network, dynamo=True)` with a dynamic batch, which converts it alone
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from bench import harness
from ccam_deploy.latency.timing import measure_in_turn, median_ratio, summarise
from ccam_deploy.text import markdown_table

NETWORKS = ("digits", "resnet18", "resnet101")
_HEADER = ("network", "export, s", "bare, s", "ratio")
_BARE = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from ccam_deploy.export.architecture import build_model
from ccam_deploy.export.recipe import read_recipe
recipe = read_recipe(Path(sys.argv[1]))
network = build_model(recipe.arch).eval()
images = torch.randn(2, len(recipe.input.mean), *recipe.input.size)
torch.onnx.export(
    network, (images,), sys.argv[2], dynamo=True, verbose=False,
    dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
)
"""


def bare_command(network: str, file: Path) -> list[str]:
    """Make the command that exports a network by PyTorch alone."""
    return [sys.executable, "-c", _BARE, str(harness.recipe_path(network)), str(file)]


def measure(network: str, rounds: int, run: Any = harness.run) -> dict[str, Any]:
    """Time both exports of one network in turn.

    Args:
        network: The name of a recipe in export/.
        rounds: How often each runs.
        run: Runs a command.

    Returns:
        The durations in seconds, and the median of the ratios of neighbouring runs.
    """
    weights = () if network == "digits" else ("--random-weights",)
    with tempfile.TemporaryDirectory() as folder:
        export = harness.export_command(network, Path(folder) / network, *weights)
        bare = bare_command(network, Path(folder) / "bare.onnx")
        calls = {"export": lambda: run(export), "bare": lambda: run(bare)}
        seconds = measure_in_turn(calls, rounds)
    figures: dict[str, Any] = {
        f"{name}_ms": asdict(summarise(durations)) for name, durations in seconds.items()
    }
    return {**figures, "ratio": median_ratio(seconds["export"], seconds["bare"])}


def table(results: Mapping[str, Any]) -> str:
    """Lay out results as Markdown, a row for each network."""
    rows = [
        (
            network,
            f"{figures['export_ms']['median'] / 1000:.1f}",
            f"{figures['bare_ms']['median'] / 1000:.1f}",
            f"{figures['ratio']:.2f}",
        )
        for network, figures in results.items()
    ]
    return markdown_table(_HEADER, rows)


def markdown(result: Mapping[str, Any]) -> str:
    """The table, the machine, and the command that makes it."""
    device = harness.device_line(result["conditions"])
    return f"{table(result['results'])}\n\n{device}.\nMade by `{result['command']}`.\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__, rounds=5, networks=NETWORKS, output="a JSON file")
    options = parser.parse_args(arguments)
    results = {}
    for network in options.networks.split(","):
        results[network] = measure(network, options.rounds)
        print(table({network: results[network]}), flush=True)
    if options.output:
        result = harness.describe_run("bench.bench_export", options, results)
        harness.write_results(options.output, result, markdown(result))


if __name__ == "__main__":
    main()

"""Which target layers make the better maps: choices of layers on crops of photographs.

    python -m bench.bench_layers --output bench/results/layers-efficientnet_lite0.json

Collection-CAM alone, on crops that the network is sure of, a few of each photograph, with intervals
over photographs. All choices come from one bundle that has every layer. With --work the measurement
goes on where it was broken off.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ccam_deploy as ccam
from bench import harness
from bench.photographs import BOUND, Photographs, photograph_of, sure_crops
from ccam_deploy.methods import CollectionCAM
from ccam_deploy.quality import report
from ccam_deploy.quality.evaluation import Evaluation, EvaluationSettings
from ccam_deploy.quality.variants import Variant

NETWORK = "efficientnet_lite0"
_INSIDE = ("_blocks.3._swish:1", "_blocks.5._swish:1", "_blocks.11._swish:1")
_OUTPUTS = ("_blocks.2", "_blocks.4", "_blocks.10")
CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    NETWORK: {
        "inside of blocks, last convolution (default)": (*_INSIDE, "_swish"),
        "the same without the shallowest": (*_INSIDE[1:], "_swish"),
        "block outputs, last convolution": (*_OUTPUTS, "_swish"),
        "block outputs alone": (*_OUTPUTS, "_blocks.15"),
    }
}
"""Layers by what they are, by network; the first choice is what an export finds by itself."""


def make_variants(choices: Mapping[str, Sequence[str]]) -> list[Variant]:
    """Make Collection-CAM on each choice of layers."""
    return [Variant(name, CollectionCAM(layers=tuple(names))) for name, names in choices.items()]


def every_layer(choices: Mapping[str, Sequence[str]]) -> list[str]:
    """List the layers of all choices, each once."""
    return list(dict.fromkeys(name for names in choices.values() for name in names))


def measure(
    bundle: Path, choices: Mapping[str, Sequence[str]], crops: int, work: Path
) -> report.Summary:
    """Measure each choice on up to so many crops of each photograph.

    Args:
        bundle: With every layer.
        choices: Names of layers by what they are.
        crops: How many of each photograph.
        work: A folder that a later run resumes from.
    """
    with ccam.load(bundle) as explainer:
        data = Photographs(sure_crops(explainer, crops))
        evaluation = Evaluation(explainer, data, make_variants(choices), EvaluationSettings())
        name = f"photographs, {crops} crops, probability {BOUND}"
        results = evaluation.open(work, name)
        for _ in evaluation.run(results):
            pass
        grouping = report.Grouping("photographs", photograph_of)
        return report.summarise(evaluation.facts(name), list(results.rows.values()), grouping)


def markdown(result: Mapping[str, Any], summary: report.Summary) -> str:
    """The table, the layers behind it, and the command that makes it."""
    lines = [f"- {name}: {', '.join(layers)}" for name, layers in result["choices"].items()]
    settings = summary.settings
    return (
        f"{report.table(summary)}\n\n{report.differences_table(summary)}\n\n"
        f"Collection-CAM on {settings['images']} crops of photographs "
        f"whose best class has a probability of at least {BOUND}, protocol {settings['protocol']}; "
        "means and 95 % intervals over photographs. "
        f"{report.differences_caption(summary)}\n\n"
        + "\n".join(lines)
        + f"\n\nMade by `{result['command']}`.\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__, rounds=1, output="a JSON file")
    parser.add_argument("--network", default=NETWORK, choices=tuple(CHOICES))
    parser.add_argument("--bundle", type=Path, help="with every layer; else exported")
    parser.add_argument("--crops", type=int, default=6, help="of each photograph, at most")
    parser.add_argument("--work", type=Path, help="a folder that a later run resumes from")
    options = parser.parse_args(arguments)
    choices = CHOICES[options.network]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = options.bundle or _export(options, choices, folder)
        summary = measure(bundle, choices, options.crops, options.work or folder / "work")
    words = {"network": options.network, "crops": options.crops, "output": options.output}
    result = {
        "command": harness.command_line("bench.bench_layers", words),
        "conditions": harness.conditions(),
        "choices": choices,
        **report.as_json(summary),
    }
    harness.publish(options.output, result, markdown(result, summary))


def _export(
    options: argparse.Namespace, choices: Mapping[str, Sequence[str]], folder: Path
) -> Path:
    layers = ",".join(every_layer(choices))
    return harness.export(options.network, folder / options.network, "--layers", layers)


if __name__ == "__main__":
    main()

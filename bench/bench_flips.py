"""How far maps move where an activation rounds to the other side of its bend.

    python -m bench.bench_flips --output bench/results/flips-efficientnet_lite0.json

Crops of real photographs that the network is sure of are explained twice by Collection-CAM: with
the gradients of ONNX Runtime's graphs, and with PyTorch's by autograd. Everything else, features
and masked forwards, is ONNX Runtime's both times, so what differs comes from the gradients alone.
Where an activation such as ReLU6 lies at a bend, its gradient is 1 on one side and 0 on the other.

Told are the relative error of the gradients, whether partitions are equal, and the largest
difference of the maps, in [0, 1], for each value of Collection-CAM's option `gate`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ccam_deploy as ccam
from bench import harness
from bench.photographs import BOUND, Crop, sure_crops
from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Classifier
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.explainer import Explainer
from ccam_deploy.fidelity.comparison import relative_error
from ccam_deploy.fidelity.observation import explain_gradients
from ccam_deploy.methods import Batch, CollectionCAM
from ccam_deploy.text import markdown_table

NETWORK = "efficientnet_lite0"
GATES = (0.0, 0.001, 0.01, 0.1)
LIMIT = 0.05
"""A map has moved where it differs by more than this anywhere."""

_SHOWN = ("median", "p90", "worst")


def measure(
    explainer: Explainer,
    reference: Classifier,
    crops: Sequence[Crop],
    methods: Mapping[str, CollectionCAM],
) -> dict[str, Any]:
    """Explain crops with the gradients of an explainer's graphs and with those of a reference.

    Args:
        explainer: Of the network's bundle.
        reference: The same network in PyTorch.
        crops: What is explained, for the network's best class.
        methods: Collection-CAM with some options, by name.

    Returns:
        For each crop the largest relative error of a layer's gradients ("gradients"); and by
        method its largest difference of maps ("maps") and whether partitions differ ("partitions").
    """
    errors: list[float] = []
    maps: dict[str, list[float]] = {name: [] for name in methods}
    partitions: dict[str, list[bool]] = {name: [] for name in methods}
    for rows in row_chunks(len(crops), explainer.batch_size):
        images, _ = explainer.preprocess([crop.read() for crop in crops[rows]])
        batch = _batch(explainer, images)
        both = (
            explainer.networks.gradients(batch.activations, batch.one_hot),
            reference.gradients(reference.backbone(images), batch.one_hot),
        )
        errors += [
            max(relative_error(a[row], b[row]) for a, b in zip(*both, strict=True))
            for row in range(len(images))
        ]
        for name, method in methods.items():
            ours, theirs = (
                explain_gradients(method, explainer.networks, values, batch) for values in both
            )
            moved = np.abs(ours.saliency - theirs.saliency).max(axis=(1, 2))
            maps[name] += moved.tolist()
            equal = [
                (a.labels == b.labels).all(axis=1)
                for a, b in zip(ours.layers, theirs.layers, strict=True)
            ]
            partitions[name] += (~np.logical_and.reduce(equal)).tolist()
    return {"gradients": errors, "maps": maps, "partitions": partitions}


def _batch(explainer: Explainer, images: Floats) -> Batch:
    """Each image with its best class."""
    activations = explainer.networks.backbone(images)
    baseline = np.zeros(activations.logits.shape[1], np.float32)
    return Batch(
        images,
        activations,
        np.arange(len(images), dtype=np.int64),
        activations.logits.argmax(axis=1).astype(np.int64),
        tuple(layer.name for layer in explainer.bundle.manifest.layers),
        baseline,
        explainer.batch_size,
    )


def torch_reference(network: str) -> Classifier:
    """Trace a recipe's network for PyTorch, nothing folded, with its default target layers."""
    from ccam_deploy.export.layers import find_layers
    from ccam_deploy.export.preparation import prepare_model
    from ccam_deploy.export.recipe import read_recipe, recipe_model, recipe_settings
    from ccam_deploy.export.reference import TorchClassifier

    path = harness.recipe_path(network)
    recipe = read_recipe(path)
    model = recipe_model(recipe, path.parent).eval()
    settings = recipe_settings(recipe, path.parent)
    prepared = prepare_model(model, recipe.input.size, recipe.layers or None, settings)
    plain = prepared.unfolded()
    return TorchClassifier(plain, find_layers(plain, prepared.layer_names))


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Describe the largest differences of maps.

    Args:
        values: One for each crop.

    Returns:
        How many are above LIMIT ("moved"), the median, the 90th percentile and the worst.
    """
    return {
        "moved": sum(value > LIMIT for value in values),
        "median": float(np.median(values)),
        "p90": float(np.percentile(values, 90)),
        "worst": float(np.max(values)),
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The table, what it means, and the command that makes it."""
    count = len(result["gradients"])
    rows = [
        (
            name,
            f"{figures['moved']} of {count}",
            *(f"{figures[key]:.4f}" for key in _SHOWN),
            f"{sum(result['partitions'][name])}",
        )
        for name, figures in result["summary"].items()
    ]
    header = ("collection-cam", f"moved by more than {LIMIT}", *_SHOWN, "other partitions")
    errors = result["gradients"]
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"{result['network']}, {count} crops of {result['photographs']} photographs whose best "
        f"class has a probability of at least {result['bound']}; largest difference of the maps "
        f"between ONNX Runtime's gradients and PyTorch's. The gradients differ by "
        f"{np.median(errors):.1e} (median) to {max(errors):.1e} (worst), relative, in the worst "
        f"layer. "
        f"{harness.device_line(result['conditions'])}.\nMade by `{result['command']}`.\n"
    )


def main(
    arguments: Sequence[str] | None = None,
    reference: Callable[[str], Classifier] = torch_reference,
) -> None:
    parser = harness.argument_parser(__doc__, rounds=1, output="a JSON file")
    parser.add_argument("--network", default=NETWORK, help="a recipe of export/")
    parser.add_argument("--bundle", type=Path, help="of the network; else exported")
    parser.add_argument("--crops", type=int, default=6, help="of each photograph")
    parser.add_argument("--gates", default=",".join(map(str, GATES)), help="values of the option")
    options = parser.parse_args(arguments)
    gates = [float(word) for word in options.gates.split(",")]
    methods = {f"gate={gate:g}": CollectionCAM(gate=gate) for gate in gates}
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle or harness.export(options.network, Path(folder) / options.network)
        with ccam.load(bundle) as explainer:
            crops = sure_crops(explainer, options.crops)
            result = measure(explainer, reference(options.network), crops, methods)
    words = {"network": options.network, "crops": options.crops, "gates": options.gates}
    result = {
        "command": harness.command_line("bench.bench_flips", {**words, "output": options.output}),
        "conditions": harness.conditions(),
        "network": options.network,
        "bound": BOUND,
        "photographs": len({crop.photograph for crop in crops}),
        "summary": {name: summarise(values) for name, values in result["maps"].items()},
        **result,
    }
    harness.publish(options.output, result, markdown(result))


if __name__ == "__main__":
    main()

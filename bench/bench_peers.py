"""How fast the same explanation is here, and by other libraries on the same network.

    python -m bench.bench_peers --output bench/results/peers-efficientnet_lite0.json

Collection-CAM and RISE are compared with PyTorch alone, because none of the libraries has them;
Score-CAM, Grad-CAM and Layer-CAM with pytorch-grad-cam, TorchCAM and Captum, as far as they have
them. The network, the image, the class, the target layer, the number of masked images in a batch,
the threads and the device are the same; so are RISE's masks. Calls of a method run in turn. Beside
each stands the greatest difference of its map, in [0, 1], from ours: what is compared is the same.

Score-CAM takes the other libraries minutes: it runs --slow-rounds times, or with --no-slow not at
all.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import asdict

import ccam_deploy as ccam
from bench import harness, peers
from bench.peers import CAPTUM, GRAD_CAM, PYTORCH, TORCHCAM, Call, Task
from ccam_deploy.explainer import Explainer
from ccam_deploy.image_files import load_image
from ccam_deploy.latency.conditions import CPU, load_average
from ccam_deploy.latency.timing import measure_in_turn, median_ratio, summarise
from ccam_deploy.methods import Method
from ccam_deploy.methods.rise import random_masks
from ccam_deploy.text import markdown_table

NETWORK = "efficientnet_lite0"
METHODS = ("collection-cam", "grad-cam", "layer-cam", "score-cam", "rise")
OURS = "ccam-deploy"
BATCH = 32
RISE_MASKS = 500
_CELLS, _P = 8, 0.5
_HEADER = ("method", "by", "median, ms", "ours is faster", "difference of the maps")


@dataclass(frozen=True)
class Contest:
    """One method, here and elsewhere.

    Attributes:
        calls: What is timed, ours first, by name.
        is_slow: Whether it takes other libraries minutes.
    """

    calls: Mapping[str, Call]
    is_slow: bool = False


def contests(explainer: Explainer, task: Task, names: Sequence[str], masks: Path) -> dict[str, Any]:
    """Make the calls of each method.

    Args:
        explainer: Of the network's bundle.
        task: What is explained.
        names: Names among METHODS.
        masks: RISE's masks, a .npy file.

    Returns:
        A Contest for each name.
    """
    images = task.image[None]

    def ours(method: str | Method) -> Call:
        def explain() -> Any:
            return explainer.explain(images, task.target, method=method).saliency[0]

        return explain

    layers = [layer.name for layer in explainer.bundle.manifest.layers]
    made = {
        "collection-cam": lambda: Contest(
            {OURS: ours("collection-cam"), PYTORCH: peers.collection_cam(task, layers)}
        ),
        "grad-cam": lambda: Contest(
            {
                OURS: ours("grad-cam"),
                GRAD_CAM: peers.by_grad_cam("GradCAM", task),
                TORCHCAM: peers.by_torchcam("GradCAM", task),
                CAPTUM: peers.by_captum(task),
            }
        ),
        "layer-cam": lambda: Contest(
            {
                OURS: ours("layer-cam"),
                GRAD_CAM: peers.by_grad_cam("LayerCAM", task),
                TORCHCAM: peers.by_torchcam("LayerCAM", task),
            }
        ),
        "score-cam": lambda: Contest(
            {
                OURS: ours(ccam.ScoreCAM(weights="softmax")),
                GRAD_CAM: peers.by_grad_cam("ScoreCAM", task),
                TORCHCAM: peers.by_torchcam("ScoreCAM", task),
            },
            is_slow=True,
        ),
        "rise": lambda: Contest(
            {
                OURS: ours(ccam.RISE(file=str(masks))),
                PYTORCH: peers.rise(task, np.load(masks), _P),
            }
        ),
    }
    return {name: made[name]() for name in names}


def measure(contest: Contest, rounds: int, warmup: int) -> dict[str, Any]:
    """Time a method's calls in turn.

    Args:
        contest: The calls.
        rounds: How often each is timed.
        warmup: How often each runs before that.

    Returns:
        By name the durations ("ms"), how many times as long as ours it takes ("ratio") and the
        greatest difference of its map from ours ("difference").
    """
    maps: dict[str, Any] = {}

    def keeping(name: str, call: Call) -> Any:
        def run() -> None:
            maps[name] = call()

        return run

    calls = {name: keeping(name, call) for name, call in contest.calls.items()}
    seconds = measure_in_turn(calls, rounds, warmup)
    return {
        name: {
            "ms": asdict(summarise(durations)),
            "ratio": median_ratio(durations, seconds[OURS]),
            "difference": float(np.abs(maps[name] - maps[OURS]).max()),
        }
        for name, durations in seconds.items()
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out results as Markdown, a row for each library of each method."""
    rows = [
        (
            method,
            name,
            f"{figures['ms']['median']:.0f}",
            "" if name == OURS else f"{figures['ratio']:.1f}×",
            "" if name == OURS else f"{figures['difference']:.1e}",
        )
        for method, by_name in results.items()
        for name, figures in by_name.items()
    ]
    return markdown_table(_HEADER, rows)


def markdown(result: Mapping[str, Any]) -> str:
    """The table, what was compared, the machine, and the command that makes it."""
    versions = ", ".join(f"{name} {version}" for name, version in result["libraries"].items())
    return (
        f"{table(result['results'])}\n\n"
        f"{result['network']}, one image, class {result['target']}, target layer "
        f"{result['layer']}, batches of {result['batch']} masked images, {result['threads']} "
        f"threads, {result['rise_masks']} masks of RISE; {versions}. "
        f"{harness.device_line(result['conditions'])}, load average before "
        f"{result['load_average']}.\nMade by `{result['command']}`.\n"
    )


def make_task(explainer: Explainer, network: str, batch: int) -> Task:
    """Prepare a photograph of the package, and a recipe's network in PyTorch."""
    from ccam_deploy.export.recipe import read_recipe, recipe_model

    images, _ = explainer.preprocess([load_image(harness.PHOTOGRAPH)])
    target = int(explainer.explain(images, method="grad-cam").targets[0])
    path = harness.recipe_path(network)
    model = recipe_model(read_recipe(path), path.parent).eval()
    layer = peers.addressable(model, explainer.bundle.manifest.layers[-1].name, images[0])
    return Task(model, layer, images[0], target, batch)


def run(bundle: Path, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure every method that was asked for."""
    import torch

    torch.set_num_threads(options.threads)
    names = options.methods.split(",")
    with ccam.load(
        bundle, backend=CPU, batch_size=options.batch, threads=options.threads
    ) as explainer:
        task = make_task(explainer, options.network, options.batch)
        masks = folder / "masks.npy"
        source = np.random.default_rng(0)
        height, width = task.image.shape[1:]
        np.save(masks, random_masks(source, options.rise_masks, _CELLS, _P, (height, width)))
        before = load_average()
        results = {}
        for name, contest in contests(explainer, task, names, masks).items():
            if contest.is_slow and options.no_slow:
                continue
            rounds = options.slow_rounds if contest.is_slow else options.rounds
            results[name] = measure(contest, rounds, 0 if contest.is_slow else 1)
            print(table({name: results[name]}), flush=True)
        layer = explainer.bundle.manifest.layers[-1].name
    return {
        "conditions": harness.conditions(),
        "libraries": {name: metadata.version(word) for name, word in peers.DISTRIBUTIONS.items()},
        "network": options.network,
        "target": task.target,
        "layer": layer,
        "batch": options.batch,
        "threads": options.threads,
        "rise_masks": options.rise_masks,
        "load_average": before,
        "results": results,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__, rounds=5, output="a JSON file")
    parser.add_argument("--network", default=NETWORK, help="a recipe of export/")
    parser.add_argument("--bundle", type=Path, help="of the network; else exported")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--batch", type=int, default=BATCH, help="masked images at a time")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rise-masks", type=int, default=RISE_MASKS)
    parser.add_argument("--slow-rounds", type=int, default=1, help="rounds of Score-CAM")
    parser.add_argument("--no-slow", action="store_true", help="leave Score-CAM out")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = options.bundle or harness.export(options.network, folder / options.network)
        result = run(bundle, options, folder)
    result = {"command": _command(options), **result}
    harness.publish(options.output, result, markdown(result))


def _command(options: argparse.Namespace) -> str:
    """The command with what the figures depend on."""
    every = options.methods == ",".join(METHODS)
    words = {
        "network": options.network,
        "methods": None if every else options.methods,
        "batch": options.batch,
        "threads": options.threads,
        "rise-masks": options.rise_masks,
        "rounds": options.rounds,
        "slow-rounds": options.slow_rounds,
        "output": options.output,
    }
    command = harness.command_line("bench.bench_peers", words)
    return f"{command} --no-slow" if options.no_slow else command


if __name__ == "__main__":
    main()

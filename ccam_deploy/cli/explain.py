"""`ccam-deploy explain`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ccam_deploy.cli.options import (
    BATCH_SIZE,
    bundle_argument,
    engine_options,
    json_option,
    look_options,
    method_choice,
    precision_option,
    print_json,
    say,
)
from ccam_deploy.errors import ImageError, OptionError

if TYPE_CHECKING:
    from PIL import Image

    from ccam_deploy.bundle.manifest import Manifest
    from ccam_deploy.explainer import Explainer
    from ccam_deploy.explanation import Explanation
    from ccam_deploy.targets import Target

KINDS = ("overlay", "heatmap", "panel", "npz", "json")


@click.command()
@bundle_argument
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=["top1"],
    show_default=True,
    help="The classes to explain: topN for the N best, or a class's number or name; may be "
    "repeated.",
)
@method_choice
@click.option(
    "--budget-ms",
    type=click.FloatRange(min=0, min_open=True),
    help="The most milliseconds for an image, all its classes together; collection-cam's k_max is "
    "lowered to keep it.  [default: no bound]",
)
@engine_options
@precision_option
@click.option(
    "--batch-size",
    default=BATCH_SIZE,
    show_default=True,
    type=click.IntRange(min=1),
    help="Images, and masked images, that go through an engine at a time.",
)
@click.option(
    "--output",
    default="explanations",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Where files are written.",
)
@click.option(
    "--save",
    default="overlay",
    show_default=True,
    help=f"What to write: {', '.join(KINDS)}, separated by commas, or none.",
)
@look_options
@click.option("--color-bar", is_flag=True, help="Add a color bar to overlays and heat maps.")
@json_option
def explain(bundle: Path, images: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Explain a classifier's decisions on IMAGES, files or folders.

    Prints one line for each image and class: file, class, score, masks of each layer, its even
    share of the milliseconds of its batch; then the files that were written. With --budget-ms
    images are explained one by one, after it was measured what that costs here, and the k_max of
    each is printed too.
    """
    from ccam_deploy import render
    from ccam_deploy.cli import choices
    from ccam_deploy.explanation import ExplanationWriter
    from ccam_deploy.image_files import find_images
    from ccam_deploy.methods.collection_cam.cost import validate_budget

    kinds = _kinds(options["save"])
    (method,) = choices.make_methods([options["method"]], options["pairs"]).values()
    budget = options["budget_ms"]
    validate_budget(budget, method)
    render.check_colormap(options["colormap"])
    files = find_images(images)
    failed = 0
    results: list[dict[str, Any]] = []
    with choices.explainer_of(bundle, options, options["batch_size"]) as explainer:
        targets = choices.targets_of(options["targets"], explainer.bundle.manifest)
        look = render.Look(options["colormap"], options["opacity"], options["color_bar"])
        writer = ExplanationWriter(options["output"], kinds, look)
        together = explainer.batch_size
        if budget is not None:
            together = 1
            say("measuring what an explanation costs here", err=True)
            explainer.calibrate(1, _most_classes(targets, explainer.bundle.manifest), method)
        with choices.progress("explaining", len(files)) as bar:
            for start in range(0, len(files), together):
                chunk = files[start : start + together]
                read, problems = _read(chunk, explainer.bundle.manifest)
                for problem in problems:
                    say(f"error: {problem}", err=True)
                failed += len(problems)
                if read:
                    pictures = [picture for _, picture in read]
                    started = time.perf_counter()
                    result = explainer.explain(
                        pictures, [targets] * len(pictures), method=method, budget_ms=budget
                    )
                    spent = (time.perf_counter() - started) * 1000
                    names = [file for file, _ in read]
                    lines = _lines(explainer, result, names, spent)
                    for line, written in zip(lines, writer.write(result, names), strict=True):
                        line["files"] = [str(path) for path in written]
                        if not as_json:
                            _print(line)
                    results += lines
                bar.update(len(chunk))
    if as_json:
        print_json(results)
    if failed:
        sys.exit(2)


def _kinds(words: str) -> tuple[str, ...]:
    if words.strip() == "none":
        return ()
    kinds = tuple(dict.fromkeys(word.strip() for word in words.split(",")))
    for kind in kinds:
        if kind not in KINDS:
            raise OptionError(f'--save "{kind}" is unknown; there are {", ".join(KINDS)} and none')
    return kinds


def _most_classes(targets: Sequence[Target], manifest: Manifest) -> int:
    """How many classes of an image some targets stand for at most."""
    from ccam_deploy.targets import Top

    counts = [target.count if isinstance(target, Top) else 1 for target in targets]
    return min(sum(counts), manifest.classes)


def _read(
    files: Sequence[Path], manifest: Manifest
) -> tuple[list[tuple[Path, Image.Image]], list[str]]:
    """The images that the network can take, and a line about each other one."""
    from ccam_deploy.cli import choices

    read, problems = [], []
    for file in files:
        try:
            read.append((file, choices.read_picture(file, manifest)))
        except ImageError as error:
            problems.append(str(error))
    return read, problems


def _lines(
    explainer: Explainer, result: Explanation, files: Sequence[Path], spent: float
) -> list[dict[str, Any]]:
    """What is reported of each image and class; milliseconds are shared evenly."""
    manifest = explainer.bundle.manifest
    budget = {key: value for key, value in result.settings.items() if key == "budget"}
    return [
        {
            "file": str(files[result.image_index[pair]]),
            "target": int(target),
            "class": manifest.label(int(target)),
            "probability": result.probability(pair),
            "logit": float(result.logits[result.image_index[pair], target]),
            "masks": {layer.name: int(layer.count[pair]) for layer in result.layers},
            "milliseconds": spent / len(result),
            **budget,
        }
        for pair, target in enumerate(result.targets)
    ]


def _print(line: dict[str, Any]) -> None:
    counts = "+".join(str(count) for count in line["masks"].values())
    masks = f"masks {counts}, " if counts else ""
    budget = ""
    if "budget" in line:
        budget = f", k_max {line['budget']['k_max']} for {line['budget']['ms']:g} ms"
    say(
        f"{line['file']}: class {line['class']}, score {line['probability']:.3f}, "
        f"{masks}{line['milliseconds']:.1f} ms{budget}"
    )
    for file in line["files"]:
        say(f"  {file}")

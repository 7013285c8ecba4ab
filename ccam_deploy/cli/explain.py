"""`ccam-deploy explain`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from ccam_deploy.cli.options import (
    AsJson,
    BundleFolder,
    ColorBar,
    EngineOptions,
    ImageFiles,
    LimitOrNone,
    LookOptions,
    MethodOptions,
    OutputFolder,
    TargetClasses,
)
from ccam_deploy.cli.parameters import Number, Option, Words, unset, with_options
from ccam_deploy.cli.printing import print_json, progress, say
from ccam_deploy.errors import ImageError, OptionError

if TYPE_CHECKING:
    from PIL import Image

    from ccam_deploy.bundle.manifest import Manifest
    from ccam_deploy.explanation import Explanation, ExplanationWriter
    from ccam_deploy.targets import Target

FILES = ("overlay", "heatmap", "panel", "masks", "npz", "json")

Budget = Annotated[
    float | None,
    Option(
        "--budget-ms",
        "Most milliseconds for an image with all its classes; lowers collection-cam's k_max.",
        Number(min=0, min_open=True),
    ),
]
Save = Annotated[
    tuple[str, ...],
    Option("--save", f"Files to write: {', '.join(FILES)}; or none.", Words()),
]


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """The options of `explain`."""

    bundle: BundleFolder
    images: ImageFiles
    targets: TargetClasses = ("top1",)
    method: MethodOptions
    budget_ms: Budget = unset("none")
    limit: LimitOrNone = unset("all")
    engine: EngineOptions
    output: OutputFolder = Path("explanations")
    save: Save = ("overlay",)
    look: LookOptions
    color_bar: ColorBar = False
    as_json: AsJson = False


@click.command()
@with_options(ExplainOptions)
def explain(options: ExplainOptions) -> None:
    """Explain a classifier's decisions on IMAGES, files or folders.

    Prints for each image and class: file, class, probability, masks of each layer, and milliseconds
    (its even share of the batch); then the files that were written to the folder --output. Images
    that cannot be read are skipped; the exit code is 2 then. A path that does not exist is an error
    before the first one.

    With --budget-ms, images are explained one by one, after a measurement of what that costs on
    this machine, and the k_max of each is printed too.
    """
    from ccam_deploy.cli import choices
    from ccam_deploy.engines.base import row_chunks
    from ccam_deploy.explanation import ExplanationWriter
    from ccam_deploy.files import require_writable_folder
    from ccam_deploy.methods.base import no_masks
    from ccam_deploy.methods.collection_cam.cost import validate_budget

    formats = _formats(options.save)
    (method,) = choices.make_methods([options.method.method], options.method.pairs).values()
    if "masks" in formats and not method.keeps_masks:
        raise no_masks(method.name)
    validate_budget(options.budget_ms, method)
    look = options.look.look(options.color_bar)
    files = choices.find_inputs(options.images, options.output)[: options.limit]
    if formats:
        require_writable_folder(options.output)
    with choices.open_explainer(options.bundle, options.engine) as explainer:
        manifest = explainer.bundle.manifest
        targets = choices.parse_targets(options.targets, manifest)
        writer = ExplanationWriter(options.output, formats, look)
        if options.budget_ms is not None:
            say("measuring what an explanation costs here", err=True)
            explainer.calibrate(1, _most_classes(targets, manifest), method)

        def explain_pictures(pictures: Sequence[Image.Image]) -> Explanation:
            return explainer.explain(
                pictures, [targets] * len(pictures), method=method, budget_ms=options.budget_ms
            )

        size = explainer.batch_size if options.budget_ms is None else 1
        batches = [files[rows] for rows in row_chunks(len(files), size)]
        reports = []
        with progress("explaining", len(files)) as bar:
            for batch in batches:
                for report in _explain_batch(batch, manifest, explain_pictures, writer):
                    reports.append(report)
                    if not options.as_json:
                        _print(report, manifest)
                bar.update(len(batch))
    if options.as_json:
        print_json(reports)
    if len({report["file"] for report in reports}) < len(set(files)):
        sys.exit(2)


def _explain_batch(
    files: Sequence[Path],
    manifest: Manifest,
    explain_pictures: Callable[[Sequence[Image.Image]], Explanation],
    writer: ExplanationWriter,
) -> list[dict[str, Any]]:
    """Explain the files that can be read, and write what was asked for.

    Returns:
        A report for each image and class.
    """
    read = _read(files, manifest)
    if not read:
        return []
    started = time.perf_counter()
    result = explain_pictures([picture for _, picture in read])
    milliseconds = (time.perf_counter() - started) * 1000
    names = [file for file, _ in read]
    reports = _reports(manifest, result, names, milliseconds)
    for report, written in zip(reports, writer.write(result, names), strict=True):
        report["files"] = [str(path) for path in written]
    return reports


def _formats(words: Sequence[str]) -> tuple[str, ...]:
    """The names of the files to write for each image and class."""
    if tuple(words) == ("none",):
        return ()
    if "none" in words:
        raise OptionError("--save none writes no files, so it goes alone")
    for word in words:
        if word not in FILES:
            raise OptionError(f'--save "{word}" is unknown; there are {", ".join(FILES)} and none')
    return tuple(words)


def _most_classes(targets: Sequence[Target], manifest: Manifest) -> int:
    """How many classes of an image some targets stand for at most."""
    from ccam_deploy.targets import Top

    counts = [target.count if isinstance(target, Top) else 1 for target in targets]
    return min(sum(counts), manifest.classes)


def _read(files: Sequence[Path], manifest: Manifest) -> list[tuple[Path, Image.Image]]:
    """The images that the network can take; an error is printed for each other file."""
    from ccam_deploy.cli import choices

    read = []
    for file in files:
        try:
            read.append((file, choices.read_picture(file, manifest)))
        except ImageError as error:
            say(f"error: {error}", err=True)
    return read


def _reports(
    manifest: Manifest, result: Explanation, files: Sequence[Path], milliseconds: float
) -> list[dict[str, Any]]:
    """What is reported for each image and class; the milliseconds are shared evenly."""
    budget = {key: value for key, value in result.settings.items() if key == "budget"}
    return [
        {
            "file": str(files[result.image_index[pair]]),
            "target": int(target),
            "class": manifest.label(int(target)),
            "probability": result.probability(pair),
            "logit": float(result.logits[result.image_index[pair], target]),
            "masks": {layer.name: int(layer.count[pair]) for layer in result.layers},
            "milliseconds": milliseconds / len(result),
            **budget,
        }
        for pair, target in enumerate(result.targets)
    ]


def _print(report: dict[str, Any], manifest: Manifest) -> None:
    value = "probability" if manifest.has_probabilities else "output"
    counts = "+".join(str(count) for count in report["masks"].values())
    masks = f"masks {counts}, " if counts else ""
    budget = ""
    if "budget" in report:
        budget = f", k_max {report['budget']['k_max']} for {report['budget']['ms']:g} ms"
    say(
        f"{report['file']}: class {report['class']}, "
        f"{value} {report['probability']:.3f}, {masks}{report['milliseconds']:.1f} ms{budget}"
    )
    for file in report["files"]:
        say(f"  {file}")

"""`ccam-deploy sanity`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from ccam_deploy.cli.network import (
    PreparedModel,
    prepare_model,
    require_torch,
    validate_image_limit,
)
from ccam_deploy.cli.options import (
    COUNT,
    PATH,
    AsJson,
    InputOptions,
    Limit,
    LookOptions,
    MethodOptions,
    ModelFile,
    ModelSource,
    OutputFolder,
    Seed,
    Threads,
)
from ccam_deploy.cli.parameters import Option, unset, with_options
from ccam_deploy.cli.printing import print_json, progress, say, write_json
from ccam_deploy.errors import OptionError
from ccam_deploy.text import text_table

if TYPE_CHECKING:
    from PIL import Image

    from ccam_deploy.arrays import Floats
    from ccam_deploy.checks.sanity import SanityCheck
    from ccam_deploy.export.randomise import RandomisedClassifier
    from ccam_deploy.export.settings import ExportSettings
    from ccam_deploy.methods import Method
    from ccam_deploy.render import Look

SCENES = "scenes"
_SHOWN_IMAGES = 3

CheckedImages = Annotated[
    tuple[Path, ...],
    Option(
        "--images",
        'Image, or folder of images, to explain; or "scenes", the synthetic ones. Can be repeated. '
        "Without it, the recipe's calibration images, or else two photographs.",
        PATH,
        multiple=True,
    ),
]
Depth = Annotated[
    int | None,
    Option("--depth", "Randomise only this many layers, from the last one back.", COUNT),
]


@dataclass(frozen=True, kw_only=True)
class SanityOptions:
    """The options of `sanity`."""

    model: ModelFile = None
    source: ModelSource
    inputs: InputOptions
    images: CheckedImages = ()
    limit: Limit = 8
    depth: Depth = unset("all")
    seed: Seed = 0
    method: MethodOptions
    threads: Threads = 0
    look: LookOptions
    output: OutputFolder = Path("sanity")
    as_json: AsJson = False


@click.command()
@with_options(SanityOptions)
def sanity(options: SanityOptions) -> None:
    """Check that maps change when a network is randomised.

    This is the test of Adebayo et al. (2018). MODEL is a model file as for `export`; it runs in
    PyTorch. The parameters of its layers become random numbers, from the last layer back: each
    together with those after it (cascading), and each alone (independent).

    Prints how alike the maps stay by mean absolute rank correlation, SSIM, and correlation of HOG
    features, and writes sanity.json and sanity.png to the folder --output. Needs the extra
    "sanity".
    """
    require_torch("sanity", "export", "sanity")
    from ccam_deploy import render
    from ccam_deploy.cli import choices
    from ccam_deploy.export.randomise import limited_threads
    from ccam_deploy.export.settings import labels_of
    from ccam_deploy.fidelity.similarity import require_scikit_image
    from ccam_deploy.files import require_writable_folder, write_file

    (method,) = choices.make_methods([options.method.method], options.method.pairs).values()
    look = options.look.look()
    validate_image_limit(options.limit, "a check")
    require_scikit_image()
    picture, report = options.output / "sanity.png", options.output / "sanity.json"
    require_writable_folder(options.output)
    on_scenes = options.images == (Path(SCENES),)
    files = () if on_scenes else options.images
    prepared = prepare_model(options.model, options.source, options.inputs, files)
    if on_scenes:
        prepared = _with_scenes(prepared, options.limit)
    with limited_threads(options.threads):
        classifier, images, result = _run(prepared, method, options)
    settings = prepared.settings
    names = labels_of(settings, classifier.program)
    content = {
        "settings": _facts(settings, method, options, classifier, images),
        "stages": _stages(result),
        "picture": str(picture),
    }
    drawn = _drawn(result, _restored(images[:_SHOWN_IMAGES], settings), names, look)
    write_file(picture, render.png(drawn))
    write_json(report, content)
    if options.as_json:
        print_json(content)
        return
    click.echo(text_table(_rows(result)))
    say(f"  {picture}")
    say(f"  {report}")


def _facts(
    settings: ExportSettings,
    method: Method,
    options: SanityOptions,
    classifier: RandomisedClassifier,
    images: Floats,
) -> dict[str, Any]:
    """All that the numbers depend on, and what they mean."""
    from ccam_deploy.checks import sanity as checks

    return {
        "model": settings.name or settings.source,
        "method": method.name,
        "options": dataclasses.asdict(method),
        "images": len(images),
        "seed": options.seed,
        "target_layers": list(classifier.layers),
        "definitions": checks.DEFINITIONS,
    }


def _with_scenes(prepared: PreparedModel, count: int) -> PreparedModel:
    """The model with synthetic scenes as its images."""
    from PIL import Image

    from ccam_deploy.examples.scenes import make_scenes

    scenes = [Image.fromarray(scene.image) for scene in make_scenes("test", count)]
    settings = dataclasses.replace(prepared.settings, calibration=scenes)
    return dataclasses.replace(prepared, settings=settings)


def _run(
    prepared: PreparedModel, method: Method, options: SanityOptions
) -> tuple[RandomisedClassifier, Floats, SanityCheck]:
    """Open the network and check it; the images are those that were explained [B, C, H, W]."""
    from ccam_deploy.checks import sanity as checks
    from ccam_deploy.export.randomise import open_randomised

    settings = prepared.settings
    classifier, images = open_randomised(
        prepared.network,
        prepared.input_size,
        prepared.target_layers(None),
        settings,
        options.seed,
    )
    depth = options.depth or len(classifier.parts)
    if depth > len(classifier.parts):
        raise OptionError(
            f"--depth is {depth}; the model has {len(classifier.parts)} layers with parameters"
        )
    images = images[: options.limit]
    with progress("randomising", 2 * depth) as bar:
        result = checks.compare_randomised(
            classifier,
            images,
            method,
            depth,
            lambda: bar.update(1),
            mean=settings.mean,
            std=settings.std,
            activation=classifier.program.activation,
        )
    return classifier, images, result


def _restored(images: Floats, settings: ExportSettings) -> list[Image.Image]:
    """Pictures of images [B, C, H, W]."""
    from ccam_deploy.preprocess import restore_image

    return [restore_image(image, settings.mean, settings.std) for image in images]


def _drawn(
    result: SanityCheck, shown: Sequence[Image.Image], names: Sequence[str], look: Look
) -> Image.Image:
    """The check's picture, for its first images."""
    from ccam_deploy.checks import sanity as checks

    captions = [names[c] if names else str(c) for c in result.targets[: len(shown)].tolist()]
    return checks.picture(result, shown, captions, look)


def _stages(result: SanityCheck) -> list[dict[str, Any]]:
    return [
        {
            "mode": stage.mode,
            "layer": stage.layer,
            "spearman": stage.spearman,
            "ssim": stage.ssim,
            "hog": stage.hog,
        }
        for stage in result.stages
    ]


def _rows(result: SanityCheck) -> list[list[str]]:
    rows = [["randomised", "layer", "|Spearman|", "SSIM", "HOG"]]
    rows += [
        [s.mode, s.layer, f"{s.spearman:.3f}", f"{s.ssim:.3f}", f"{s.hog:.3f}"]
        for s in result.stages
    ]
    return rows

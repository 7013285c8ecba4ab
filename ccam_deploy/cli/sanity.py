"""`ccam-deploy sanity`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ccam_deploy.cli.network import Prepared, model_options, need_torch, prepare
from ccam_deploy.cli.options import json_option, look_options, method_choice, print_json, say
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


@click.command()
@model_options
@click.option(
    "--images",
    multiple=True,
    type=click.Path(path_type=Path),
    help='A file or folder of images, may be repeated; or "scenes", the synthetic ones.  '
    "[default: the recipe's calibration images, else two photographs of the package]",
)
@click.option(
    "--count",
    default=8,
    show_default=True,
    type=click.IntRange(1, 16),
    help="The most images that are explained.",
)
@click.option(
    "--layers",
    "limit",
    type=click.IntRange(min=1),
    help="How many layers to randomise, from the last one down.  [default: all]",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**32 - 1),
    help="What the random parameters come from.",
)
@method_choice
@click.option(
    "--threads",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="PyTorch's threads; 0 lets it choose.",
)
@click.option(
    "--output",
    default="sanity",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder for sanity.png and sanity.json.",
)
@look_options
@json_option
def sanity(model: Path | None, as_json: bool, **options: Any) -> None:
    """Check that maps change when a network's parameters are randomised (Adebayo et al. 2018).

    MODEL is given as to export, and runs in PyTorch. Its layers are randomised from the last one
    down, each with all before it (cascading) and each alone (independent); printed is how alike
    the maps stay: mean absolute rank correlation, SSIM, and correlation of HOG features. Needs the
    extra "sanity".
    """
    need_torch("sanity", "export,sanity")
    from ccam_deploy import render
    from ccam_deploy.checks import sanity as checks
    from ccam_deploy.cli import choices
    from ccam_deploy.export.randomise import limited_threads
    from ccam_deploy.fidelity.similarity import require_scikit_image
    from ccam_deploy.files import require_writable, write_file

    (method,) = choices.make_methods([options["method"]], options["pairs"]).values()
    render.check_colormap(options["colormap"])
    require_scikit_image()
    require_writable(options["output"] / "sanity.json")
    on_scenes = options["images"] == (Path(SCENES),)
    prepared = prepare(model, options, () if on_scenes else options["images"])
    settings = _with_images(prepared.settings, on_scenes, options["count"])
    with limited_threads(options["threads"]):
        classifier, images, result = _run(prepared, settings, method, options)
    content = {
        "settings": {
            "model": settings.name or settings.source,
            "method": method.name,
            "options": asdict(method),
            "images": len(images),
            "seed": options["seed"],
            "target_layers": list(classifier.layers),
            "definitions": checks.DEFINITIONS,
        },
        "stages": _stages(result),
        "picture": str(options["output"] / "sanity.png"),
    }
    look = render.Look(options["colormap"], options["opacity"])
    drawn = _drawn(result, images[:_SHOWN_IMAGES], settings, look)
    write_file(options["output"] / "sanity.png", render.png(drawn))
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_file(options["output"] / "sanity.json", text.encode("utf-8", "backslashreplace"))
    if as_json:
        print_json(content)
        return
    click.echo(text_table(_rows(result)))
    say(f"  {content['picture']}")
    say(f"  {options['output'] / 'sanity.json'}")


def _with_images(settings: ExportSettings, on_scenes: bool, count: int) -> ExportSettings:
    """The settings, with scenes as their images where those are wanted."""
    from PIL import Image

    from ccam_deploy.examples.scenes import make_scenes

    if not on_scenes:
        return settings
    scenes = make_scenes("test", count)
    return replace(settings, calibration=[Image.fromarray(scene.image) for scene in scenes])


def _run(
    prepared: Prepared, settings: ExportSettings, method: Method, options: dict[str, Any]
) -> tuple[RandomisedClassifier, Floats, SanityCheck]:
    """Open the network and check it; the images are those that were explained [B, C, H, W]."""
    from ccam_deploy.checks import sanity as checks
    from ccam_deploy.cli import choices
    from ccam_deploy.export.randomise import open_randomised

    classifier, images = open_randomised(
        prepared.network,
        prepared.input_size(options["input_size"]),
        prepared.layers(None),
        settings,
        options["seed"],
    )
    count = options["limit"] or len(classifier.parts)
    if count > len(classifier.parts):
        raise OptionError(
            f"--layers is {count}; the model has {len(classifier.parts)} with parameters"
        )
    images = images[: options["count"]]
    with choices.progress("randomising", 2 * count) as bar:
        result = checks.compare_randomised(
            classifier,
            images,
            method,
            count,
            lambda: bar.update(1),
            mean=settings.mean,
            std=settings.std,
        )
    return classifier, images, result


def _drawn(
    result: SanityCheck, images: Floats, settings: ExportSettings, look: Look
) -> Image.Image:
    """The check's picture, of some images [B, C, H, W]."""
    from ccam_deploy.checks import sanity as checks
    from ccam_deploy.preprocess import restore_image

    shown = [restore_image(image, settings.mean, settings.std) for image in images]
    names = settings.labels
    captions = [names[c] if names else str(c) for c in result.targets[: len(images)].tolist()]
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

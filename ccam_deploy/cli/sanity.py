"""`ccam-deploy sanity`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ccam_deploy.cli.network import model_options, need_torch, prepare
from ccam_deploy.cli.options import (
    json_option,
    look_options,
    method_choice,
    print_json,
    table,
)
from ccam_deploy.errors import OptionError

if TYPE_CHECKING:
    from ccam_deploy.evaluate.sanity import SanityCheck
    from ccam_deploy.export.exporter import ExportSettings
    from ccam_deploy.render import Floats

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
@click.option("--seed", default=0, show_default=True, help="What the random parameters come from.")
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
    from ccam_deploy import files, render
    from ccam_deploy.cli import choices
    from ccam_deploy.evaluate import sanity as checks
    from ccam_deploy.evaluate.similarity import check_hog
    from ccam_deploy.export.randomise import limited_threads, open_randomised
    from ccam_deploy.methods import with_options

    ((name, given),) = choices.method_options([options["method"]], options["pairs"]).items()
    render.check_colormap(options["colormap"])
    check_hog()
    files.check_place(options["output"] / "sanity.json")
    on_scenes = options["images"] == (Path(SCENES),)
    prepared = prepare(model, options, () if on_scenes else options["images"])
    settings = _with_images(prepared.settings, on_scenes, options["count"])
    with limited_threads(options["threads"]):
        classifier, images = open_randomised(
            prepared.network,
            prepared.input_size(options["input_size"]),
            prepared.layers(None),
            settings,
            options["seed"],
        )
        limit = options["limit"]
        if limit and limit > len(classifier.parts):
            raise OptionError(
                f"--layers is {limit}; the model has {len(classifier.parts)} with parameters"
            )
        images = images[: options["count"]]
        with choices.progress("randomising", 2 * (limit or len(classifier.parts))) as bar:
            result = checks.check(
                classifier, images, with_options(name, given), limit, lambda: bar.update(1)
            )
    shown = _pictures(images[:_SHOWN_IMAGES], settings)
    labels = settings.labels or tuple(map(str, range(int(result.targets.max()) + 1)))
    captions = [labels[int(target)] for target in result.targets[:_SHOWN_IMAGES]]
    look = render.Look(options["colormap"], options["opacity"])
    drawn = checks.picture(result, shown, captions, look)
    content = {
        "settings": {
            "model": settings.name or settings.source,
            "method": name,
            "options": list(options["pairs"]),
            "images": len(images),
            "seed": options["seed"],
            "target_layers": list(classifier.layers),
        },
        "stages": _stages(result),
        "picture": str(options["output"] / "sanity.png"),
    }
    files.write(options["output"] / "sanity.png", render.png(drawn))
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    files.write(options["output"] / "sanity.json", text.encode("utf-8", "backslashreplace"))
    if as_json:
        print_json(content)
        return
    click.echo(table(_rows(result)))
    click.echo(f"  {content['picture']}\n  {options['output'] / 'sanity.json'}")


def _with_images(settings: ExportSettings, on_scenes: bool, count: int) -> ExportSettings:
    """The settings, with scenes as their images where those are wanted."""
    from dataclasses import replace

    from PIL import Image

    from ccam_deploy.evaluate.scenes import make_scenes

    if not on_scenes:
        return settings
    scenes = make_scenes("test", count)
    return replace(settings, calibration=[Image.fromarray(scene.image) for scene in scenes])


def _pictures(images: Floats, settings: ExportSettings) -> list[Any]:
    """Preprocessed images [B, C, H, W] as the pictures that the network sees."""
    import numpy as np
    from PIL import Image

    shape = (1, -1, 1, 1)
    pixels = images * np.reshape(settings.std, shape) + np.reshape(settings.mean, shape)
    values = np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(value.squeeze()) for value in values]


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

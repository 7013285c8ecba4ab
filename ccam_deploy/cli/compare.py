"""`ccam-deploy compare`."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ccam_deploy.cli.options import (
    BATCH_SIZE,
    METHODS,
    bundle_argument,
    engine_options,
    look_options,
    pairs_option,
    precision_option,
    say,
)
from ccam_deploy.errors import OptionError

if TYPE_CHECKING:
    from ccam_deploy.explanation import Explanation
    from ccam_deploy.render import Look, Tile

COMPARED = ("collection-cam", "grad-cam", "grad-cam++", "layer-cam")


@click.command()
@bundle_argument
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "--methods",
    default=",".join(COMPARED),
    show_default=True,
    help=f"The methods, separated by commas: {', '.join(METHODS)}.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=["top1"],
    show_default=True,
    help="The classes, a row each: topN for the N best, or a class's number or name; may be "
    "repeated.",
)
@pairs_option
@engine_options
@precision_option
@click.option(
    "--batch-size",
    default=BATCH_SIZE,
    show_default=True,
    type=click.IntRange(min=1),
    help="Masked images that go through an engine at a time.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The picture, a .png file.  [default: explanations/IMAGE-compare.png]",
)
@look_options
@click.option("--color-bar", is_flag=True, help="Add a color bar at the end of each row.")
def compare(bundle: Path, image: Path, **options: Any) -> None:
    """Draw the maps of several methods side by side for IMAGE.

    Each class has a row: the image with class and score, then each method's map. Prints a line
    for each method with the milliseconds of its first run and its options, then the file that was
    written.
    """
    from ccam_deploy import render
    from ccam_deploy.cli import choices
    from ccam_deploy.files import require_writable, write_file
    from ccam_deploy.quality.variants import Variant, require_runnable

    names = list(dict.fromkeys(word.strip() for word in options["methods"].split(",")))
    methods = choices.make_methods(names, options["pairs"])
    render.check_colormap(options["colormap"])
    output = options["output"] or Path("explanations") / f"{image.stem}-compare.png"
    if output.suffix.lower() != ".png":
        raise OptionError(f"the picture is a .png file; {output} is none")
    require_writable(output)
    look = render.Look(options["colormap"], options["opacity"], options["color_bar"])
    with choices.explainer_of(bundle, options, options["batch_size"]) as explainer:
        manifest = explainer.bundle.manifest
        picture = choices.read_picture(image, manifest)
        targets = choices.targets_of(options["targets"], manifest)
        require_runnable(explainer, [Variant(name, method) for name, method in methods.items()])
        results = {}
        for name, method in methods.items():
            started = time.perf_counter()
            results[name] = explainer.explain([picture], [targets], method=method)
            spent = (time.perf_counter() - started) * 1000
            say(f"{name}: {spent:.1f} ms, {_words(results[name])}")
    shown = render.thumbnail(picture)
    rows = []
    first = next(iter(results.values()))
    for row, target in enumerate(first.targets):
        caption = f"{manifest.label(int(target))} {first.probability(row):.3f}"
        rows.append([(caption, shown), *_tiles(results, row, look)])
    write_file(output, render.png(render.grid(rows)))
    say(f"  {output}")


def _words(result: Explanation) -> str:
    """The options that a method ran with."""
    options = result.settings["options"]
    return " ".join(f"{key}={json.dumps(value)}" for key, value in options.items())


def _tiles(results: dict[str, Explanation], row: int, look: Look) -> list[Tile]:
    """Each method's map over the picture; the colour bar, if wanted, on the last one."""
    plain = replace(look, bar=False)
    last = list(results)[-1]
    return [
        (name, result.overlay(row, look if name == last else plain))
        for name, result in results.items()
    ]

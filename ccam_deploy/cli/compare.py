"""`ccam-deploy compare`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from ccam_deploy.cli.options import (
    PATH,
    AsJson,
    BundleFolder,
    ColorBar,
    EngineOptions,
    LookOptions,
    MethodNames,
    MethodPairs,
    TargetClasses,
    output_to,
)
from ccam_deploy.cli.parameters import Argument, unset, with_options
from ccam_deploy.cli.printing import print_json, say
from ccam_deploy.errors import OptionError

if TYPE_CHECKING:
    from PIL import Image

    from ccam_deploy.explanation import Explanation
    from ccam_deploy.render import Look, Tile

COMPARED = ("collection-cam", "grad-cam", "grad-cam++", "layer-cam")

ImageFile = Annotated[Path, Argument(PATH)]
OutputPicture = Annotated[Path | None, output_to("a .png file")]


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """The options of `compare`."""

    bundle: BundleFolder
    image: ImageFile
    methods: MethodNames = COMPARED
    pairs: MethodPairs = ()
    targets: TargetClasses = ("top1",)
    engine: EngineOptions
    look: LookOptions
    color_bar: ColorBar = False
    output: OutputPicture = unset("explanations/IMAGE-compare.png")
    as_json: AsJson = False


@click.command()
@with_options(CompareOptions)
def compare(options: CompareOptions) -> None:
    """Draw the maps of several methods side by side for IMAGE.

    Each class has a row: the image with class and probability, then each method's map. Prints for
    each method the time of its first run and its options, then the .png file that was written.
    """
    from ccam_deploy import render
    from ccam_deploy.cli import choices
    from ccam_deploy.files import require_writable, short_stem, write_file
    from ccam_deploy.quality.variants import Variant, require_runnable

    methods = choices.make_methods(options.methods, options.pairs)
    look = options.look.look(options.color_bar)
    output = options.output or Path("explanations") / f"{short_stem(options.image)}-compare.png"
    if output.suffix.lower() != ".png":
        raise OptionError(f"--output {output} must end in .png")
    require_writable(output)
    with choices.open_explainer(options.bundle, options.engine) as explainer:
        manifest = explainer.bundle.manifest
        picture = choices.read_picture(options.image, manifest)
        targets = choices.parse_targets(options.targets, manifest)
        require_runnable(explainer, [Variant(name, method) for name, method in methods.items()])
        results = {}
        reports = []
        for name, method in methods.items():
            started = time.perf_counter()
            results[name] = explainer.explain([picture], [targets], method=method)
            milliseconds = (time.perf_counter() - started) * 1000
            method_options = results[name].settings["options"]
            reports.append(
                {"method": name, "milliseconds": milliseconds, "options": method_options}
            )
            if not options.as_json:
                say(f"{name}: {milliseconds:.1f} ms, {_words(method_options)}")
    first = next(iter(results.values()))
    labels = [manifest.label(int(target)) for target in first.targets]
    rows = _rows(picture, labels, results, look)
    write_file(output, render.png(render.grid(rows)))
    if options.as_json:
        print_json({"classes": labels, "methods": reports, "picture": str(output)})
    else:
        say(f"  {output}")


def _words(method_options: Mapping[str, Any]) -> str:
    """A method's options as they are written after --option."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in method_options.items())


def _rows(
    picture: Image.Image, labels: Sequence[str], results: Mapping[str, Explanation], look: Look
) -> list[list[Tile]]:
    """A row for each class: the image, and each method's map over it."""
    from ccam_deploy import render

    shown = render.thumbnail(picture)
    rows = []
    for row, label in enumerate(labels):
        probability = next(iter(results.values())).probability(row)
        rows.append([(f"{label} {probability:.3f}", shown), *_tiles(results, row, look)])
    return rows


def _tiles(results: Mapping[str, Explanation], row: int, look: Look) -> list[Tile]:
    """Each method's map over the picture; the color bar, if any, on the last one."""
    plain = replace(look, bar=False)
    last = list(results)[-1]
    return [
        (name, result.overlay(row, look if name == last else plain))
        for name, result in results.items()
    ]

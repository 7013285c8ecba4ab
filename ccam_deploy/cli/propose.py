"""`ccam-deploy propose`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from ccam_deploy.cli.options import (
    bundle_argument,
    engine_options,
    json_option,
    method_choice,
    precision_option,
    print_json,
    say,
)
from ccam_deploy.errors import ImageError, OptionError
from ccam_deploy.text import text_table

if TYPE_CHECKING:
    from PIL import Image

    from ccam_deploy.checks.proposals import Box, Peak
    from ccam_deploy.explainer import Explainer
    from ccam_deploy.methods import Method
    from ccam_deploy.render import Tile
    from ccam_deploy.targets import Target

SCENES = "scenes"
SCENES_LIMIT = 50
_SHOWN_SCENES = 6
_PROPOSED, _TRUE = (0, 220, 0), (255, 0, 0)


@click.command()
@bundle_argument
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=["top1"],
    show_default=True,
    help="The classes whose objects are wanted: topN for the N best, or a class's number or name; "
    "may be repeated. Scenes have their own.",
)
@click.option(
    "--boxes",
    default=5,
    show_default=True,
    type=click.IntRange(min=0),
    help="Boxes of an image; 0 for one for each peak, as the paper has it.",
)
@click.option(
    "--peak-threshold",
    default=0.5,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="The least height of a peak, as a share of the map's maximum.",
)
@click.option(
    "--mode",
    default="fast",
    show_default=True,
    type=click.Choice(["fast", "quality"]),
    help="Selective search's mode; quality gives more candidates and takes longer.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**32 - 1),
    help="Selective search ranks partly by chance.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help=f"How many scenes of each kind.  [default: {SCENES_LIMIT}]",
)
@method_choice
@engine_options
@precision_option
@click.option(
    "--output",
    default="proposals",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder for pictures and proposals.json.",
)
@json_option
def propose(bundle: Path, images: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Propose boxes of objects by selective search, alone and guided by a map's peaks.

    IMAGES are files or folders; the word "scenes" alone stands for the synthetic scenes, whose
    boxes are known: it prints the recall at an IoU of 0.5 and the mean best IoU of both, for equal
    numbers of boxes. Needs the extra "proposals".
    """
    from ccam_deploy.checks import proposals
    from ccam_deploy.cli import choices
    from ccam_deploy.files import require_writable
    from ccam_deploy.image_files import find_images

    on_scenes = images == (Path(SCENES),)
    _check(on_scenes, options)
    found = [] if on_scenes else find_images(images)
    (method,) = choices.make_methods([options["method"]], options["pairs"]).values()
    proposals.require_opencv()
    require_writable(options["output"] / "proposals.json")
    with choices.explainer_of(bundle, options) as explainer:
        proposer = _Proposer(explainer, method, options)
        content = (
            _on_scenes(proposer, options) if on_scenes else _on_images(proposer, found, options)
        )
    _write(content, as_json, options["output"] / "proposals.json")
    if len(content["images"]) < len(found):
        sys.exit(2)


def _write(content: dict[str, Any], as_json: bool, path: Path) -> None:
    """Write what was found, unless no image could be read, and print it."""
    from ccam_deploy.files import write_file

    if not content["images"] and not content["results"]:
        return
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_file(path, text.encode("utf-8", "backslashreplace"))
    if as_json:
        print_json(content)
        return
    if content["results"]:
        click.echo(text_table(_rows(content["results"])))
        say(f"  {content['picture']}")
    for entry in content["images"]:
        say(
            f"{entry['file']}: class {', '.join(entry['classes'])}, "
            f"peaks {len(entry['peaks'])}, boxes {len(entry['guided'])}"
        )
        say(f"  {entry['picture']}")
    say(f"  {path}")


@dataclass(frozen=True)
class _Proposal:
    """What is proposed for one picture: as many boxes of selective search alone as guided ones."""

    classes: Sequence[int]
    peaks: Sequence[tuple[int, Peak]]
    alone: Sequence[Box]
    guided: Sequence[Box]
    overlay: Image.Image


class _Proposer:
    """Proposes boxes with one explainer and fixed options."""

    def __init__(self, explainer: Explainer, method: Method, options: dict[str, Any]) -> None:
        self.explainer = explainer
        self._method = method
        self._options = options

    @property
    def settings(self) -> dict[str, Any]:
        """All that the boxes depend on, and what the words stand for."""
        from ccam_deploy.checks import proposals

        options = self._options
        manifest = self.explainer.bundle.manifest
        return {
            "bundle": manifest.name,
            "digest": manifest.digest,
            "backend": self.explainer.networks.backend,
            "precision": self.explainer.precision,
            "method": self._method.name,
            "options": dataclasses.asdict(self._method),
            **{name: options[name] for name in ("boxes", "peak_threshold", "mode", "seed")},
            "definitions": proposals.DEFINITIONS,
        }

    def propose(self, picture: Image.Image, targets: Sequence[Target]) -> _Proposal:
        """Boxes for the objects of some classes in a picture."""
        import numpy as np

        from ccam_deploy import render
        from ccam_deploy.checks import proposals

        options = self._options
        result = self.explainer.explain([picture], [targets], method=self._method)
        classes = [int(target) for target in result.targets]
        maps = [result.on_original(row) for row in range(len(classes))]
        peaks = [
            (target, peak)
            for target, saliency in zip(classes, maps, strict=True)
            for peak in proposals.peaks(saliency, options["peak_threshold"])
        ]
        peaks.sort(key=lambda entry: -entry[1].value)
        ranked = proposals.selective_search(picture, options["mode"], options["seed"])
        guided = proposals.guided(ranked, [peak for _, peak in peaks], options["boxes"])
        shown, highest = render.shrunk(picture, np.max(maps, axis=0))
        overlay = render.overlay(shown, highest, seen=result.geometries[0].seen_in(shown.size))
        return _Proposal(classes, peaks, ranked[: len(guided)], guided, overlay)


def _check(on_scenes: bool, options: dict[str, Any]) -> None:
    from click.core import ParameterSource

    source = click.get_current_context().get_parameter_source("targets")
    if on_scenes and source is ParameterSource.COMMANDLINE:
        raise OptionError("--target goes with images; the classes of scenes are known")
    if not on_scenes and options["limit"]:
        raise OptionError(f"--limit goes with {SCENES}; give the images that you want")


def _on_images(
    proposer: _Proposer, found: Sequence[Path], options: dict[str, Any]
) -> dict[str, Any]:
    """Propose boxes for the files that can be read, and draw them; a line for each other one."""
    from ccam_deploy import render
    from ccam_deploy.cli import choices
    from ccam_deploy.files import unused, write_file

    manifest = proposer.explainer.bundle.manifest
    stems: Counter[str] = Counter()
    content = []
    with choices.progress("proposing", len(found)) as bar:
        for file in found:
            bar.update(1)
            try:
                picture = choices.read_picture(file, manifest)
            except ImageError as error:
                say(f"error: {error}", err=True)
                continue
            proposal = proposer.propose(picture, choices.targets_of(options["targets"], manifest))
            tiles = [("map", proposal.overlay), *_tiles(picture, proposal, options["method"])]
            path = options["output"] / f"{unused(file.stem, stems)}-proposals.png"
            write_file(path, render.png(render.panel(tiles)))
            content.append(
                {
                    "file": str(file),
                    "width": picture.width,
                    "height": picture.height,
                    "classes": [manifest.label(target) for target in proposal.classes],
                    "peaks": [
                        {"class": manifest.label(target), **dataclasses.asdict(peak)}
                        for target, peak in proposal.peaks
                    ],
                    "selective_search": proposal.alone,
                    "guided": proposal.guided,
                    "picture": str(path),
                }
            )
    return {"settings": proposer.settings, "images": content, "results": []}


def _on_scenes(proposer: _Proposer, options: dict[str, Any]) -> dict[str, Any]:
    """Propose boxes for scenes of every kind and measure them; draw the first few."""
    from PIL import Image

    from ccam_deploy import render
    from ccam_deploy.checks import proposals
    from ccam_deploy.cli import choices
    from ccam_deploy.examples.scenes import Kind, make_scene
    from ccam_deploy.files import write_file

    limit = options["limit"] or SCENES_LIMIT
    kinds = get_args(Kind)
    results: list[dict[str, Any]] = []
    rows: list[list[Tile]] = []
    with choices.progress("proposing", limit * len(kinds)) as bar:
        for kind in kinds:
            alone, guided, truth = [], [], []
            for number in range(limit):
                scene = make_scene("test", number, kind)
                picture = Image.fromarray(scene.image)
                proposal = proposer.propose(picture, list(dict.fromkeys(scene.digits)))
                alone.append(proposal.alone)
                guided.append(proposal.guided)
                truth.append(scene.boxes)
                if number < _SHOWN_SCENES // len(kinds):
                    rows.append(_tiles(picture, proposal, options["method"], scene.boxes))
                bar.update(1)
            results += [
                {"scenes": kind, "boxes_of": name, **dataclasses.asdict(measured)}
                for name, measured in (
                    ("selective search", proposals.coverage(alone, truth)),
                    (f"with {options['method']}", proposals.coverage(guided, truth)),
                )
            ]
    path = options["output"] / "scenes.png"
    write_file(path, render.png(render.grid(rows)))
    settings = {**proposer.settings, "limit": limit}
    return {"settings": settings, "images": [], "results": results, "picture": str(path)}


def _tiles(
    picture: Image.Image, proposal: _Proposal, method: str, truth: Sequence[Box] = ()
) -> list[Tile]:
    """The boxes of selective search alone and of the guided one, true ones below them in red."""
    from ccam_deploy import render

    shown = (
        ("selective search", proposal.alone),
        (f"with {method}", proposal.guided),
    )
    return [
        (caption, render.boxed(picture, {_TRUE: truth, _PROPOSED: boxes}))
        for caption, boxes in shown
    ]


def _rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [["scenes", "boxes of", "recall", "mean best IoU", "objects", "boxes"]]
    rows += [
        [
            entry["scenes"],
            entry["boxes_of"],
            f"{entry['recall']:.3f}",
            f"{entry['best_iou']:.3f}",
            str(entry["objects"]),
            str(entry["boxes"]),
        ]
        for entry in results
    ]
    return rows

"""`ccam-deploy propose`."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import click
from click.core import ParameterSource

from ccam_deploy.cli.options import (
    AsJson,
    BundleFolder,
    EngineOptions,
    ImageFiles,
    LimitOrNone,
    MethodOptions,
    OutputFolder,
    Seed,
    TargetClasses,
)
from ccam_deploy.cli.parameters import Number, Option, unset, with_options
from ccam_deploy.cli.printing import print_json, progress, say, write_json
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

BoxCount = Annotated[
    int,
    Option(
        "--boxes",
        "Boxes to propose for an image; 0 for one at each peak, as in the paper.",
        click.IntRange(min=0),
    ),
]
PeakThreshold = Annotated[
    float,
    Option(
        "--peak-threshold",
        "Smallest height of a peak, as a share of the map's maximum.",
        Number(0, 1, min_open=True),
    ),
]
SearchMode = Annotated[
    Literal["fast", "quality"],
    Option(
        "--mode",
        "Mode of the selective search; quality finds more candidates and takes longer.",
        click.Choice(["fast", "quality"]),
    ),
]


@dataclass(frozen=True, kw_only=True)
class ProposeOptions:
    """The options of `propose`."""

    bundle: BundleFolder
    images: ImageFiles
    targets: TargetClasses = ("top1",)
    boxes: BoxCount = 5
    peak_threshold: PeakThreshold = 0.5
    mode: SearchMode = "fast"
    seed: Seed = 0
    limit: LimitOrNone = unset(f"all; {SCENES_LIMIT} scenes of each kind")
    method: MethodOptions
    engine: EngineOptions
    output: OutputFolder = Path("proposals")
    as_json: AsJson = False


@click.command()
@with_options(ProposeOptions)
def propose(options: ProposeOptions) -> None:
    """Propose boxes around objects, guided by the peaks of a map.

    The boxes come from selective search, alone and guided by the map. IMAGES are files or folders.
    The word "scenes" alone stands for the synthetic scenes, whose true boxes are known: then the
    recall at an IoU of 0.5 and the mean best IoU of both are printed, for equal numbers of boxes.

    Writes pictures and proposals.json to the folder --output. Images that cannot be read are
    skipped; the exit code is 2 then. Needs the extra "proposals".
    """
    from ccam_deploy.checks import proposals
    from ccam_deploy.cli import choices
    from ccam_deploy.files import require_writable_folder

    on_scenes = options.images == (Path(SCENES),)
    source = click.get_current_context().get_parameter_source("targets")
    if on_scenes and source is ParameterSource.COMMANDLINE:
        raise OptionError("--target goes with images; the classes of scenes are known")
    files = [] if on_scenes else choices.find_inputs(options.images, options.output)
    files = files[: options.limit]
    (method,) = choices.make_methods([options.method.method], options.method.pairs).values()
    proposals.require_opencv()
    require_writable_folder(options.output)
    with choices.open_explainer(options.bundle, options.engine) as explainer:
        proposer = _Proposer(explainer, method, options)
        content = _on_scenes(proposer) if on_scenes else _on_images(proposer, files)
    _write(content, options.as_json, options.output / "proposals.json")
    if len(content["images"]) < len(files):
        sys.exit(2)


def _write(content: dict[str, Any], as_json: bool, path: Path) -> None:
    """Write the proposals, unless no image could be read, and print them."""
    if not content["images"] and not content["results"]:
        return
    write_json(path, content)
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
    """Proposes boxes with one explainer, one method and fixed options."""

    def __init__(self, explainer: Explainer, method: Method, options: ProposeOptions) -> None:
        self.explainer = explainer
        self.options = options
        self.method = method

    @property
    def settings(self) -> dict[str, Any]:
        """All that the boxes depend on, and what the numbers mean."""
        from ccam_deploy.checks import proposals

        options = self.options
        manifest = self.explainer.bundle.manifest
        return {
            "bundle": manifest.name,
            "digest": manifest.digest,
            "backend": self.explainer.networks.backend,
            "precision": self.explainer.precision,
            "method": self.method.name,
            "options": dataclasses.asdict(self.method),
            "boxes": options.boxes,
            "peak_threshold": options.peak_threshold,
            "mode": options.mode,
            "seed": options.seed,
            "definitions": proposals.DEFINITIONS,
        }

    def propose(self, picture: Image.Image, targets: Sequence[Target]) -> _Proposal:
        """Boxes for the objects of some classes in a picture."""
        import numpy as np

        from ccam_deploy import render
        from ccam_deploy.checks import proposals

        options = self.options
        result = self.explainer.explain([picture], [targets], method=self.method)
        classes = [int(target) for target in result.targets]
        maps = [result.on_original(row) for row in range(len(classes))]
        peaks = [
            (target, peak)
            for target, saliency in zip(classes, maps, strict=True)
            for peak in proposals.peaks(saliency, options.peak_threshold)
        ]
        peaks.sort(key=lambda entry: -entry[1].value)
        ranked = proposals.selective_search(picture, options.mode, options.seed)
        guided = proposals.guided(ranked, [peak for _, peak in peaks], options.boxes)
        shown, highest = render.shrunk(picture, np.max(maps, axis=0))
        overlay = render.overlay(shown, highest, seen=result.geometries[0].seen_in(shown.size))
        return _Proposal(classes, peaks, ranked[: len(guided)], guided, overlay)


def _on_images(proposer: _Proposer, files: Sequence[Path]) -> dict[str, Any]:
    """Propose boxes for the files that can be read, and draw them; report each other file."""
    from ccam_deploy import render
    from ccam_deploy.cli import choices
    from ccam_deploy.files import short_stem, unused, write_file

    manifest = proposer.explainer.bundle.manifest
    targets = choices.parse_targets(proposer.options.targets, manifest)
    stems: Counter[str] = Counter()
    content = []
    with progress("proposing", len(files)) as bar:
        for file in files:
            bar.update(1)
            try:
                picture = choices.read_picture(file, manifest)
            except ImageError as error:
                say(f"error: {error}", err=True)
                continue
            proposal = proposer.propose(picture, targets)
            tiles = [("map", proposal.overlay), *_tiles(picture, proposal, proposer.method.name)]
            path = proposer.options.output / f"{unused(short_stem(file), stems)}-proposals.png"
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


def _on_scenes(proposer: _Proposer) -> dict[str, Any]:
    """Propose boxes for scenes of every kind and measure them; draw the first few."""
    from PIL import Image

    from ccam_deploy import render
    from ccam_deploy.checks import proposals
    from ccam_deploy.examples.scenes import SceneType, make_scene
    from ccam_deploy.files import write_file

    limit = proposer.options.limit or SCENES_LIMIT
    scene_types = get_args(SceneType)
    results: list[dict[str, Any]] = []
    rows: list[list[Tile]] = []
    with progress("proposing", limit * len(scene_types)) as bar:
        for scene_type in scene_types:
            alone, guided, truth = [], [], []
            for number in range(limit):
                scene = make_scene("test", number, scene_type)
                picture = Image.fromarray(scene.image)
                proposal = proposer.propose(picture, list(dict.fromkeys(scene.digits)))
                alone.append(proposal.alone)
                guided.append(proposal.guided)
                truth.append(scene.boxes)
                if number < _SHOWN_SCENES // len(scene_types):
                    rows.append(_tiles(picture, proposal, proposer.method.name, scene.boxes))
                bar.update(1)
            results += [
                {"scenes": scene_type, "boxes_of": name, **dataclasses.asdict(measured)}
                for name, measured in (
                    ("selective search", proposals.coverage(alone, truth)),
                    (f"with {proposer.method.name}", proposals.coverage(guided, truth)),
                )
            ]
    path = proposer.options.output / "scenes.png"
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

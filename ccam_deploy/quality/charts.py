"""Pictures of an evaluation: mean curves, and a grid of maps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from ccam_deploy import plotting, render
from ccam_deploy.arrays import Doubles
from ccam_deploy.explainer import Explainer
from ccam_deploy.preprocess import restore_image
from ccam_deploy.quality.datasets import Dataset
from ccam_deploy.quality.evaluation import Variant
from ccam_deploy.quality.results import CURVES, Row

SHOWN = 6
"""How many images the grid of maps has at most."""

_TILE = 192


def draw_curves(curves: Mapping[str, Mapping[str, Doubles]]) -> bytes:
    """Mean deletion and insertion curves [n] by method, side by side, as a PNG.

    Raises OptionError where matplotlib is missing.
    """
    plotting.require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), CURVES, strict=True):
        for method, found in curves.items():
            if kind in found:
                share = np.linspace(0, 100, len(found[kind]))
                axes.plot(share, found[kind], label=method)
        axes.set_xlabel(f"steps of {kind} taken, %")
        axes.set_title(kind)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.axes[0].set_ylabel("mean probability of the class")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=144)
    return content.getvalue()


def draw_maps(
    explainer: Explainer, dataset: Dataset, contenders: Sequence[Variant], rows: Sequence[Row]
) -> bytes:
    """The maps of the first images that were measured, an image a row, a method a column: a PNG.

    Images are shown as the network sees them, with their boxes. rows: see Results.
    Raises OptionError where no image was measured.
    """
    places = list(dict.fromkeys(row.index for row in rows if row.was_read))[:SHOWN]
    targets = {row.index: row.target for row in rows}
    items = [dataset[place] for place in places]
    images, geometries = explainer.preprocess([item.read() for item in items])
    classes = [targets[place] for place in places]
    maps = [one.explain(explainer, images, classes).saliency for one in contenders]
    manifest = explainer.bundle.manifest
    how = manifest.preprocessing
    grid = []
    for row, (item, geometry) in enumerate(zip(items, geometries, strict=True)):
        picture = restore_image(images[row], how.mean, how.std).convert("RGB")
        tiles = [(manifest.label(classes[row]), _framed(picture, geometry.to_input(item.boxes)))]
        for one, saliency in zip(contenders, maps, strict=True):
            overlay = render.overlay(picture, saliency[row])
            tiles.append((one.name, _framed(overlay, geometry.to_input(item.boxes))))
        grid.append(tiles)
    return render.png(render.grid(grid, _TILE))


def _framed(picture: Image.Image, boxes: Doubles) -> Image.Image:
    framed = picture.copy()
    draw = ImageDraw.Draw(framed)
    for left, top, right, bottom in boxes:
        draw.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline="white")
    return framed

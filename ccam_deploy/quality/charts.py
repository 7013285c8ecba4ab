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
from ccam_deploy.quality.results import CURVES, Row
from ccam_deploy.quality.variants import Variant

SHOWN = 6
"""How many images the grid of maps has at most."""

_TILE = 192


def draw_curves(curves: Mapping[str, Mapping[str, Doubles]]) -> bytes:
    """Draw mean deletion and insertion curves side by side.

    Args:
        curves: By method and name, probabilities [n].

    Returns:
        The content of a PNG file.

    Raises:
        OptionError: Matplotlib is missing.
    """
    plotting.require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, curve in zip(figure.subplots(1, 2, sharey=True), CURVES, strict=True):
        for method, points_by_curve in curves.items():
            if curve in points_by_curve:
                points = points_by_curve[curve]
                axes.plot(np.linspace(0, 100, len(points)), points, label=method)
        axes.set_xlabel(f"steps of {curve} taken, %")
        axes.set_title(curve)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.axes[0].set_ylabel("mean probability of the class")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=plotting.DOTS_PER_INCH)
    return content.getvalue()


def draw_maps(
    explainer: Explainer, dataset: Dataset, variants: Sequence[Variant], rows: Sequence[Row]
) -> bytes:
    """Draw the maps of the first images that were measured, with their boxes.

    Args:
        explainer: Explains the images again.
        dataset: Where the images come from.
        variants: The methods, a column each.
        rows: The measured rows, see Results; up to SHOWN images are drawn, a row each, as the
            network sees them.

    Returns:
        The content of a PNG file.

    Raises:
        OptionError: No image was measured.
    """
    places = list(dict.fromkeys(row.index for row in rows if row.was_read))[:SHOWN]
    targets = {row.index: row.target for row in rows}
    items = [dataset[place] for place in places]
    images, geometries = explainer.preprocess([item.read() for item in items])
    classes = [targets[place] for place in places]
    maps = [variant.explain(explainer, images, classes).saliency for variant in variants]
    manifest = explainer.bundle.manifest
    preprocessing = manifest.preprocessing
    grid = []
    for row, (item, geometry) in enumerate(zip(items, geometries, strict=True)):
        picture = restore_image(images[row], preprocessing.mean, preprocessing.std).convert("RGB")
        tiles = [(manifest.label(classes[row]), _framed(picture, geometry.to_input(item.boxes)))]
        for variant, saliency in zip(variants, maps, strict=True):
            overlay = render.overlay(picture, saliency[row])
            tiles.append((variant.name, _framed(overlay, geometry.to_input(item.boxes))))
        grid.append(tiles)
    return render.png(render.grid(grid, _TILE))


def _framed(picture: Image.Image, boxes: Doubles) -> Image.Image:
    framed = picture.copy()
    draw = ImageDraw.Draw(framed)
    for left, top, right, bottom in boxes:
        draw.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline="white")
    return framed

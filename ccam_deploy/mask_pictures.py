"""Pictures of masks: what each shows of an image, beside its weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ccam_deploy import render
from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.manifest import Preprocessing
from ccam_deploy.preprocess import restore_image
from ccam_deploy.render import Look, Tile


@dataclass(frozen=True)
class LayerMasks:
    """The masks of a target layer.

    Attributes:
        name: The layer.
        masks: [n, H, W] float32 in [0, 1].
        weights: [n] float32, the masks' weights α; 0 for a flat mask.
        channels: [n], how many of the layer's channels each mask is made of.
    """

    name: str
    masks: Floats
    weights: Floats
    channels: NDArray[np.intp]


def mask_tiles(image: Floats, layer: LayerMasks, how: Preprocessing, look: Look) -> list[Tile]:
    """Draw a layer's part of the map, and its masks in falling order of weight.

    Args:
        image: [C, H, W] float32, preprocessed; C is 1 or 3.
        layer: The layer.
        how: How the image was preprocessed.
        look: Color map and opacity of the layer's part of the map.

    Returns:
        The pictures with their captions; see Explanation.masks_panel.

    Raises:
        OptionError: The color map is unknown, or the opacity is out of range.
    """
    part = np.einsum("n,nij->ij", layer.weights, layer.masks)
    highest = float(part.max())
    scaled: Floats = part / np.float32(highest) if highest > 0 else part
    picture = restore_image(image, how.mean, how.std)
    overlay = render.overlay(picture, scaled, look.colormap, look.opacity)
    tiles = [(f"{layer.name}: {layer.weights.sum():.3f}", overlay)]
    for index in np.argsort(-layer.weights, kind="stable"):
        shown = restore_image(image * layer.masks[index], how.mean, how.std).convert("RGB")
        tiles.append((f"{layer.weights[index]:.3f}, {layer.channels[index]} ch.", shown))
    return tiles

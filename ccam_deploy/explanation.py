"""What an explanation gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Floats
from ccam_deploy.errors import ImageError
from ccam_deploy.methods import LayerPartition, MaskSequence
from ccam_deploy.preprocess import Geometry


@dataclass(frozen=True)
class Explanation:
    """Saliency maps for P (image, class) pairs of B images, image by image.

    saliency: [P, H, W] float32, each map scaled to [0, 1].
    raw_saliency: [P, H, W] float32, as the method defines it.
    targets: [P] int64, each map's class.   image_index: [P] int64, its image; with one class an
        image, 0..B-1.   logits: [B, classes] float32, of the images as they are.
    layers: each target layer's collections.   masks[p]: [N, H, W] float32 in [0, 1], N masks from
        the shallowest layer to the deepest.   weights[p]: [N] float32, the masks' weights α,
        0 for a flat mask.   mic[p]: [N] float32, their increase of confidence over the baseline.
        Only Collection-CAM gives all four. Score-CAM gives the weight and increase of each channel
        [C]; what a method does not give has length 0.
    timings: seconds in each stage.   settings: method, options and engine that gave the result,
        and the budget where there was one, as cost.Budget tells it.
    geometries: where each image's input lies in the original; empty for array input.
    """

    saliency: Floats
    raw_saliency: Floats
    targets: NDArray[np.int64]
    image_index: NDArray[np.int64]
    logits: Floats
    layers: tuple[LayerPartition, ...]
    masks: MaskSequence
    weights: tuple[Floats, ...]
    mic: tuple[Floats, ...]
    timings: dict[str, float]
    settings: dict[str, Any]
    geometries: tuple[Geometry, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.targets)

    def probability(self, pair: int) -> float:
        """The softmax probability of a pair's class."""
        logits = self.logits[self.image_index[pair]].astype(np.float64)
        exponent = np.exp(logits - logits.max())
        return float(exponent[self.targets[pair]] / exponent.sum())

    def on_original(self, pair: int) -> Floats:
        """A pair's saliency on the original image: [height, width] float32, 0 where unseen.

        Raises ImageError where the explanation was made from an array.
        """
        if not self.geometries:
            raise ImageError("the explanation was made from an array, which has no original image")
        geometry = self.geometries[int(self.image_index[pair])]
        return geometry.to_original(self.saliency[pair])

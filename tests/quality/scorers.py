"""Classifiers that are small enough to work out by hand."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Floats
from tests.helpers import noise


class LinearScorer:
    """Logits are weights [classes, C·H·W] times pixels; remembers how many came at a time."""

    def __init__(self, weights: Floats) -> None:
        self.weights = weights
        self.sizes: list[int] = []

    def logits(self, images: Floats) -> Floats:
        flat = images.reshape(len(images), -1)
        logits: Floats = (flat.astype(np.float64) @ self.weights.T).astype(np.float32)
        return logits

    def masked_logits(self, images: Floats, masks: Floats, owner: NDArray[np.int64]) -> Floats:
        self.sizes.append(len(masks))
        return self.logits(images[owner] * masks[:, None])


def random_scorer(shape: tuple[int, int, int], classes: int = 3, seed: int = 1) -> LinearScorer:
    """Weights small enough that probabilities stay away from 0 and 1."""
    size = shape[0] * shape[1] * shape[2]
    return LinearScorer(noise(classes, size, seed=seed) / np.float32(np.sqrt(size)))

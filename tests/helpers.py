"""What many tests need: folders, example pictures, random arrays, the paper's definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ccam_deploy.arrays import Floats
from ccam_deploy.image_files import load_image

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "export"
SCENES = RECIPES / "scenes"
PHOTOGRAPHS = RECIPES / "examples"
DIGITS_LAYERS = ("layer1", "layer2", "layer3", "layer4")


def example_files() -> list[Path]:
    """The scenes that are kept for the example classifier."""
    return sorted(SCENES.glob("*.png"))


def example_pictures() -> list[Image.Image]:
    return [load_image(path) for path in example_files()]


def noise(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ward_by_definition(psi: NDArray[np.float64]) -> list[list[list[int]]]:
    """Every partition of Ward's hierarchy, from all singletons to one, by the increase of the
    squared error itself (the paper's eq. 10, 11)."""

    def error(members: list[int]) -> float:
        points = psi[members]
        return float(((points - points.mean(0)) ** 2).sum())

    clusters = [[i] for i in range(len(psi))]
    partitions = [[list(c) for c in clusters]]
    while len(clusters) > 1:
        pairs = [(i, j) for i in range(len(clusters)) for j in range(i + 1, len(clusters))]
        i, j = min(
            pairs,
            key=lambda p: (
                error(clusters[p[0]] + clusters[p[1]])
                - error(clusters[p[0]])
                - error(clusters[p[1]])
            ),
        )
        merged = clusters[i] + clusters[j]
        clusters = [c for n, c in enumerate(clusters) if n not in (i, j)] + [merged]
        partitions.append([sorted(c) for c in clusters])
    return partitions


def ratio_by_definition(psi: NDArray[np.float64], partition: list[list[int]]) -> float:
    """The mean dispersion-separation ratio, loop by loop (the paper's eq. 12-15)."""
    centroids = [psi[members].mean(0) for members in partition]
    total = 0.0
    for i, members in enumerate(partition):
        dic = sum(((psi[m] - centroids[i]) ** 2).sum() for m in members) / len(members)
        sic = min(
            ((centroids[i] - centroids[j]) ** 2).sum() for j in range(len(partition)) if j != i
        )
        total += (sic - dic) / (sic + dic) if sic + dic else 0.0
    return total / len(partition)

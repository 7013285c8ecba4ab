"""Crops of real photographs that installed packages hold, for measuring maps on.

The photographs are those of scikit-image, scikit-learn and Matplotlib that show something that
ImageNet has a class for. Nothing is copied or downloaded. Crops of one photograph are not
independent: intervals have to be taken over photographs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files

import numpy as np
from PIL import Image

from ccam_deploy.engines.base import row_chunks
from ccam_deploy.explainer import Explainer
from ccam_deploy.quality.datasets import Dataset, Item
from ccam_deploy.quality.metrics import class_probabilities, masked_logits

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels, right and bottom exclusive."""

FILES = {
    "astronaut": ("skimage.data", "astronaut.png"),
    "camera": ("skimage.data", "camera.png"),
    "chelsea": ("skimage.data", "chelsea.png"),
    "china": ("sklearn.datasets.images", "china.jpg"),
    "clock": ("skimage.data", "clock_motion.png"),
    "coffee": ("skimage.data", "coffee.png"),
    "coins": ("skimage.data", "coins.png"),
    "flower": ("sklearn.datasets.images", "flower.jpg"),
    "gravel": ("skimage.data", "gravel.png"),
    "hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    "motorcycle": ("skimage.data", "motorcycle_left.png"),
    "rocket": ("skimage.data", "rocket.jpg"),
}
"""Package and file of each photograph."""

SMALLEST = 96
"""The shortest side of a crop, in pixels."""

BOUND = 0.4
"""A network is sure of a crop whose best class has at least this softmax probability."""

_SCALES = (0.35, 1.0)
_ASPECTS = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Crop:
    """A part of a photograph.

    Attributes:
        photograph: A name among FILES.
        box: The part.
    """

    photograph: str
    box: Box

    def read(self) -> Image.Image:
        """Open the part as an RGB picture."""
        return photograph(self.photograph).crop(self.box)


@cache
def photograph(name: str) -> Image.Image:
    """Open a photograph among FILES as an RGB picture."""
    package, file = FILES[name]
    with (files(package) / file).open("rb") as content, Image.open(content) as picture:
        return picture.convert("RGB")


def draw_crops(name: str, count: int, seed: int) -> list[Crop]:
    """Draw crops of a photograph: the whole of it, then some of other scales, shapes and places.

    Args:
        name: Of the photograph.
        count: How many.
        seed: Of the draw; each photograph has a stream of its own.

    Returns:
        The crops. Their sides are at least SMALLEST pixels, or the photograph's.
    """
    stream = np.random.default_rng([seed, *name.encode()])
    width, height = photograph(name).size
    crops = [Crop(name, (0, 0, width, height))]
    while len(crops) < count:
        side = min(width, height) * stream.uniform(*_SCALES)
        stretch = np.sqrt(np.exp(stream.uniform(*np.log(_ASPECTS))))
        across = int(np.clip(side * stretch, min(SMALLEST, width), width))
        down = int(np.clip(side / stretch, min(SMALLEST, height), height))
        left = int(stream.integers(0, width - across + 1))
        top = int(stream.integers(0, height - down + 1))
        crops.append(Crop(name, (left, top, left + across, top + down)))
    return crops


def sure_crops(
    explainer: Explainer, most: int, bound: float = BOUND, seed: int = 0, tries: int = 400
) -> list[Crop]:
    """Choose crops that a network is sure of, the first ones that are drawn.

    Args:
        explainer: Of the network.
        most: How many of each photograph, at most.
        bound: The least softmax probability of the best class.
        seed: Of the draw.
        tries: How many crops of each photograph are drawn at most.

    Returns:
        The crops, photograph by photograph.
    """
    chosen = []
    for name in FILES:
        sure: list[Crop] = []
        crops = draw_crops(name, tries, seed)
        for rows in row_chunks(len(crops), explainer.batch_size):
            if len(sure) >= most:
                break
            best = _best(explainer, crops[rows])
            sure += [crop for crop, p in zip(crops[rows], best, strict=True) if p >= bound]
        chosen += sure[:most]
    return chosen


def _best(explainer: Explainer, crops: Sequence[Crop]) -> list[float]:
    """The softmax probability of the best class of each of a batch's crops."""
    images, _ = explainer.preprocess([crop.read() for crop in crops])
    whole = np.ones((len(images), *images.shape[2:]), np.float32)
    logits = masked_logits(explainer.networks, images, whole, explainer.batch_size)
    best: list[float] = class_probabilities(logits, logits.argmax(axis=1), "softmax").tolist()
    return best


class Photographs(Dataset):
    """Crops as a data set without classes or boxes; names begin with the photograph's."""

    has_classes = False

    def __init__(self, crops: Sequence[Crop]) -> None:
        self._crops = tuple(crops)
        self.names = tuple(
            f"{crop.photograph} {','.join(map(str, crop.box))}" for crop in self._crops
        )

    def __getitem__(self, index: int) -> Item:
        crop = self._crops[index]
        return Item(self.names[index], partial(Crop.read, crop))


def photograph_of(name: str) -> str:
    """The photograph that an item of Photographs is a crop of, by the item's name."""
    return name.partition(" ")[0]

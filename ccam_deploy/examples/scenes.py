"""Digits in scenes: a synthetic data set with exact boxes, made from data that scikit-learn ships.

Handwritten digits, light with a soft dark halo, at random places and sizes on crops of two
photographs. It is synthetic: it serves to train the small example classifier and to measure
explanations where the truth about the object's place is known. The photographs' left part and
one part of the digits are for training, the rest for testing, so that neither meets the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ccam_deploy.errors import OptionError
from ccam_deploy.extras import install

SIZE = 96
CLASSES = 10
_TRAINING_SHARE = 0.7
_TRIES = 200

Split = Literal["train", "test"]
SceneType = Literal["single", "two-classes", "several"]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """One picture and the objects in it.

    Attributes:
        image: [SIZE, SIZE, 3] uint8.
        digits: The class of each object.
        boxes: (left, top, right, bottom) of each object in pixels, right and bottom exclusive.
    """

    image: NDArray[np.uint8]
    digits: tuple[int, ...]
    boxes: tuple[Box, ...]


def require_scikit_learn() -> None:
    """Make sure that scikit-learn, which has the digits and photographs, is installed.

    Raises:
        OptionError: It is not.
    """
    _scikit_learn()


def make_scene(split: Split, seed: int, scene_type: SceneType = "single") -> Scene:
    """Make one scene; the same arguments give the same scene.

    Args:
        split: "train" or "test"; they share no digit and no part of a photograph.
        seed: Of the scene.
        scene_type: "single" for one digit, "two-classes" for two digits of different classes,
            "several" for two or three digits of one class.

    Returns:
        The scene.

    Raises:
        OptionError: The split or type is unknown, or scikit-learn is not installed.
    """
    if split not in ("train", "test"):
        raise OptionError(f'split "{split}" is unknown; use train or test')
    stream = np.random.default_rng((seed, split == "test"))
    classes = _draw_classes(stream, scene_type)
    largest = 60 if len(classes) == 1 else 40
    canvas = _background(stream, split)
    boxes: list[Box] = []
    for digit in classes:
        glyph = _glyph(stream, split, digit, int(stream.integers(26, largest)))
        box = _place(stream, glyph, boxes)
        _paint(stream, canvas, glyph, box)
        boxes.append(_tight(glyph, box))
    image = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    return Scene(image, classes, tuple(boxes))


def make_scenes(
    split: Split, count: int, seed: int = 0, scene_type: SceneType = "single"
) -> tuple[Scene, ...]:
    """Make scenes with consecutive seeds.

    Args:
        split: See make_scene.
        count: The number of scenes.
        seed: Of the first scene.
        scene_type: See make_scene.

    Returns:
        The scenes.

    Raises:
        OptionError: The split or type is unknown, or scikit-learn is not installed.
    """
    return tuple(make_scene(split, seed + index, scene_type) for index in range(count))


def _draw_classes(stream: np.random.Generator, scene_type: SceneType) -> tuple[int, ...]:
    if scene_type == "single":
        return (int(stream.integers(CLASSES)),)
    if scene_type == "two-classes":
        first, second = stream.choice(CLASSES, 2, replace=False)
        return int(first), int(second)
    if scene_type == "several":
        return (int(stream.integers(CLASSES)),) * int(stream.integers(2, 4))
    raise OptionError(f'scene type "{scene_type}" is unknown; use single, two-classes or several')


@cache
def _photographs(split: Split) -> tuple[Image.Image, ...]:
    parts = []
    for photograph in _scikit_learn().load_sample_images().images:
        border = int(photograph.shape[1] * _TRAINING_SHARE)
        part = photograph[:, :border] if split == "train" else photograph[:, border:]
        parts.append(Image.fromarray(part))
    return tuple(parts)


@cache
def _digits(split: Split) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    data = _scikit_learn().load_digits()
    border = int(len(data.target) * _TRAINING_SHARE)
    rows = slice(None, border) if split == "train" else slice(border, None)
    return data.images[rows] / 16.0, data.target[rows]


def _scikit_learn() -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise OptionError(f"digits in scenes need scikit-learn: {install('scenes')}") from error
    return datasets


def _background(stream: np.random.Generator, split: Split) -> NDArray[np.float32]:
    photographs = _photographs(split)
    photograph = photographs[int(stream.integers(len(photographs)))]
    side = int(stream.integers(80, min(photograph.size)))
    left = int(stream.integers(photograph.width - side + 1))
    top = int(stream.integers(photograph.height - side + 1))
    crop = photograph.crop((left, top, left + side, top + side)).resize((SIZE, SIZE))
    if stream.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gain = stream.uniform(0.6, 1.1)
    return np.asarray(crop, dtype=np.float32) * np.float32(gain)


def _glyph(stream: np.random.Generator, split: Split, digit: int, side: int) -> NDArray[np.float32]:
    """A digit's opacity [side, side] in [0, 1]."""
    images, classes = _digits(split)
    drawing = images[stream.choice(np.flatnonzero(classes == digit))]
    small = Image.fromarray((drawing * 255).astype(np.uint8))
    turned = small.resize((side, side), Image.Resampling.BICUBIC).rotate(
        float(stream.uniform(-12, 12)), Image.Resampling.BILINEAR
    )
    opacity = np.asarray(turned, dtype=np.float32) / 255
    return np.clip((opacity - 0.2) / 0.5, 0, 1)


def _place(stream: np.random.Generator, glyph: NDArray[np.float32], taken: list[Box]) -> Box:
    side = glyph.shape[0]
    for _ in range(_TRIES):
        left, top = (int(value) for value in stream.integers(0, SIZE - side + 1, 2))
        box = (left, top, left + side, top + side)
        if not any(_overlap(box, other) for other in taken):
            return box
    return _freest(side, taken)


def _freest(side: int, taken: list[Box]) -> Box:
    """The corner farthest from all boxes, for the rare case that no free place was drawn."""
    corners = [(x, y) for x in (0, SIZE - side) for y in (0, SIZE - side)]
    left, top = max(corners, key=lambda c: min(abs(c[0] - b[0]) + abs(c[1] - b[1]) for b in taken))
    return (left, top, left + side, top + side)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _paint(
    stream: np.random.Generator,
    canvas: NDArray[np.float32],
    glyph: NDArray[np.float32],
    box: Box,
) -> None:
    opacity = np.zeros((SIZE, SIZE), np.float32)
    opacity[box[1] : box[3], box[0] : box[2]] = glyph
    outline = Image.fromarray((opacity * 255).astype(np.uint8))
    blurred = outline.filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.GaussianBlur(2.5))
    halo = np.asarray(blurred, dtype=np.float32)[..., None] / 255
    colour = stream.uniform(190, 255, 3).astype(np.float32)
    canvas *= 1 - 0.7 * halo
    canvas += opacity[..., None] * (colour - canvas)


def _tight(glyph: NDArray[np.float32], box: Box) -> Box:
    rows = np.flatnonzero((glyph > 0.3).any(axis=1))
    columns = np.flatnonzero((glyph > 0.3).any(axis=0))
    left, top = box[0] + int(columns[0]), box[1] + int(rows[0])
    right, bottom = box[0] + int(columns[-1]) + 1, box[1] + int(rows[-1]) + 1
    return (left, top, right, bottom)

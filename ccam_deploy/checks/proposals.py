"""Object proposals: selective search alone, and guided by the peaks of a saliency map.

The paper's section IV.F: selective search (Uijlings et al. 2013) gives ranked candidates; for each
peak of the map of a class, the best-ranked candidate that contains it is proposed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image
from scipy import ndimage

from ccam_deploy.arrays import Floats
from ccam_deploy.errors import OptionError

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels, right and bottom exclusive."""
Mode = Literal["fast", "quality"]

FOUND = 0.5
"""The least IoU of a box with an object for the object to count as found."""

DEFINITIONS = {
    "boxes": "left, top, right, bottom in pixels of the image, right and bottom exclusive",
    "peaks": "local maxima of the class's map of at least peak_threshold times its maximum, each "
    "the highest in the square around it that is a sixth of the map's shorter side wide",
    "selective_search": "the best-ranked candidates of OpenCV's selective search (Uijlings et al. "
    "2013), as many as there are guided ones",
    "guided": "the best-ranked candidate that contains a peak, for each peak, the highest first; "
    "where more boxes are wanted than that, each peak's second candidate, and so on (Ha & Youn "
    "2022, section IV.F, which takes one for each peak)",
    "recall": f"share of the objects that a box overlaps with an IoU of at least {FOUND}",
    "best_iou": "mean over the objects of the best box's IoU",
}
"""What the words of a result stand for."""

_NEIGHBOURHOOD = 12
_LARGEST_SIDE = 500


@dataclass(frozen=True)
class Peak:
    """A local maximum of a saliency map: its pixel, and the map's value there."""

    x: int
    y: int
    value: float


@dataclass(frozen=True)
class Recall:
    """How well proposals cover known objects.

    recall: share of the objects that a box overlaps with an IoU of at least 0.5.
    best_iou: mean over the objects of the best box's IoU.   objects, boxes: how many there were.
    """

    recall: float
    best_iou: float
    objects: int
    boxes: int


def peaks(saliency: Floats, threshold: float = 0.5) -> list[Peak]:
    """The local maxima of a map [H, W], the highest first.

    A peak is the highest in the square around it that is a sixth of the map's shorter side wide,
    and reaches `threshold` times the map's maximum; a plateau counts once, by the pixel nearest to
    its middle. A map without positive values has none.
    Raises OptionError for a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise OptionError(f"threshold is {threshold}; it must be in (0, 1]")
    reach = max(1, min(saliency.shape) // _NEIGHBOURHOOD)
    highest = ndimage.maximum_filter(saliency, 2 * reach + 1, mode="nearest")
    tops = (saliency == highest) & (saliency > 0) & (saliency >= threshold * saliency.max())
    labels, count = ndimage.label(tops, np.ones((3, 3)))
    found = []
    for label in range(1, count + 1):
        pixels = np.argwhere(labels == label)
        distances = ((pixels - pixels.mean(axis=0)) ** 2).sum(axis=1)
        y, x = (int(place) for place in pixels[distances.argmin()])
        found.append(Peak(x, y, float(saliency[y, x])))
    return sorted(found, key=lambda peak: -peak.value)


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes, in [0, 1]."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (_area(one) + _area(other) - shared)


def guided(candidates: Sequence[Box], places: Sequence[Peak], count: int = 0) -> list[Box]:
    """The best-ranked candidates that contain a peak.

    candidates: the best first.   places: peaks, the highest first.
    count: how many boxes; 0 for one for each peak, as the paper has it. Where there are more boxes
        than peaks, each peak's second candidate follows, then each one's third, and so on.
    Returns at most `count` boxes, none twice.
    """
    queues = [[box for box in candidates if _contains(box, peak)] for peak in places]
    chosen: list[Box] = []
    for rank in range(1 if count == 0 else len(candidates)):
        chosen += [queue[rank] for queue in queues if rank < len(queue)]
    unique = list(dict.fromkeys(chosen))
    return unique[:count] if count else unique


def coverage(proposed: Sequence[Sequence[Box]], objects: Sequence[Sequence[Box]]) -> Recall:
    """Measure the boxes proposed for some images against the boxes of the objects in them.

    Raises ValueError where there is no object.
    """
    best = [
        max((iou(box, truth) for box in boxes), default=0.0)
        for boxes, truths in zip(proposed, objects, strict=True)
        for truth in truths
    ]
    if not best:
        raise ValueError("there are no objects to cover")
    found = sum(value >= FOUND for value in best)
    boxes = sum(map(len, proposed))
    return Recall(found / len(best), sum(best) / len(best), len(best), boxes)


def check() -> None:
    """Raise OptionError where OpenCV's selective search is missing."""
    try:
        from cv2 import ximgproc  # noqa: F401
    except ImportError as error:
        raise OptionError(
            f"selective search cannot be imported ({error}): pip install 'ccam-deploy[proposals]'"
        ) from error


def selective_search(picture: Image.Image, mode: Mode = "fast", seed: int = 0) -> list[Box]:
    """OpenCV's selective search in an RGB picture: candidates, the best-ranked first.

    mode: "fast" for two colour spaces, "quality" for more of them and more scales.
    seed: part of the ranking is drawn by chance, as its authors have it.
    Pictures with a side longer than 500 pixels are searched at that size.
    Raises OptionError for another mode, or without OpenCV.
    """
    if mode not in get_args(Mode):
        raise OptionError(f'mode "{mode}" is unknown; there are {", ".join(get_args(Mode))}')
    check()
    from cv2 import ximgproc

    scale = min(1.0, _LARGEST_SIDE / max(picture.size))
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    pixels = np.asarray(picture.resize(size))[:, :, ::-1].copy()
    search = ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(pixels)
    if mode == "fast":
        search.switchToSelectiveSearchFast()
    else:
        search.switchToSelectiveSearchQuality()
    # OpenCV draws with C's rand(), which has no other handle.
    ctypes.CDLL(None).srand(seed)
    found = np.asarray(search.process()).tolist()
    across, down = picture.width / size[0], picture.height / size[1]
    return [
        (
            int(left * across),
            int(top * down),
            min(round((left + width) * across), picture.width),
            min(round((top + height) * down), picture.height),
        )
        for left, top, width, height in found
    ]


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _contains(box: Box, peak: Peak) -> bool:
    return box[0] <= peak.x < box[2] and box[1] <= peak.y < box[3]

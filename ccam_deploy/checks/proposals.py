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
from ccam_deploy.extras import install

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are exclusive."""
Mode = Literal["fast", "quality"]

FOUND = 0.5
"""The least IoU of a box with an object that counts as finding it."""

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
"""The meaning of the words in a result."""

_NEIGHBOURHOOD = 12
_LARGEST_SIDE = 500


@dataclass(frozen=True)
class Peak:
    """A local maximum of a saliency map.

    Attributes:
        x: The pixel's column.
        y: The pixel's row.
        value: The map's value there.
    """

    x: int
    y: int
    value: float


@dataclass(frozen=True)
class Recall:
    """How well proposals cover known objects.

    Attributes:
        recall: Share of the objects that a box overlaps with an IoU of at least FOUND.
        best_iou: Mean over the objects of the best box's IoU, in [0, 1].
        objects: How many objects there are.
        boxes: How many boxes were proposed.
    """

    recall: float
    best_iou: float
    objects: int
    boxes: int


def peaks(saliency: Floats, threshold: float = 0.5) -> list[Peak]:
    """Find the local maxima of a map.

    A peak is the highest in the square around it that is a sixth of the map's shorter side wide,
    and reaches `threshold` times the map's maximum; a plateau counts once, by the pixel nearest to
    its middle.

    Args:
        saliency: [H, W] float32.
        threshold: In (0, 1].

    Returns:
        The peaks, the highest first; none for a map without positive values.

    Raises:
        OptionError: The threshold is outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise OptionError(f"threshold is {threshold}; it must be in (0, 1]")
    reach = max(1, min(saliency.shape) // _NEIGHBOURHOOD)
    highest = ndimage.maximum_filter(saliency, 2 * reach + 1, mode="nearest")
    tops = (saliency == highest) & (saliency > 0) & (saliency >= threshold * saliency.max())
    labels, count = ndimage.label(tops, np.ones((3, 3)))
    maxima = []
    for label in range(1, count + 1):
        pixels = np.argwhere(labels == label)
        distances = ((pixels - pixels.mean(axis=0)) ** 2).sum(axis=1)
        y, x = (int(place) for place in pixels[distances.argmin()])
        maxima.append(Peak(x, y, float(saliency[y, x])))
    return sorted(maxima, key=lambda peak: -peak.value)


def iou(a: Box, b: Box) -> float:
    """Compute the intersection over union of two boxes, in [0, 1]."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (_area(a) + _area(b) - shared)


def guided(candidates: Sequence[Box], places: Sequence[Peak], count: int = 0) -> list[Box]:
    """Select the best-ranked candidates that contain a peak (Ha & Youn 2022, section IV.F).

    Args:
        candidates: Boxes, the best first.
        places: Peaks, the highest first.
        count: How many boxes; 0 for one for each peak, as the paper has it. Where there are fewer
            peaks than boxes, each peak's second candidate follows, then each one's third, and so
            on.

    Returns:
        At most `count` boxes, none twice.
    """
    queues = [[box for box in candidates if _contains(box, peak)] for peak in places]
    boxes: list[Box] = []
    for rank in range(1 if count == 0 else len(candidates)):
        boxes += [queue[rank] for queue in queues if rank < len(queue)]
    unique = list(dict.fromkeys(boxes))
    return unique[:count] if count else unique


def coverage(proposed: Sequence[Sequence[Box]], objects: Sequence[Sequence[Box]]) -> Recall:
    """Measure proposed boxes against the objects in images.

    Args:
        proposed: For each image its proposed boxes.
        objects: For each image the boxes of its objects.

    Returns:
        The coverage over all objects of all images.

    Raises:
        ValueError: There is no object.
    """
    best = [
        max((iou(box, truth) for box in boxes), default=0.0)
        for boxes, truths in zip(proposed, objects, strict=True)
        for truth in truths
    ]
    if not best:
        raise ValueError("there are no objects to cover")
    hits = sum(value >= FOUND for value in best)
    boxes = sum(map(len, proposed))
    return Recall(hits / len(best), sum(best) / len(best), len(best), boxes)


def require_opencv() -> None:
    """Raise OptionError where OpenCV's selective search is missing."""
    try:
        from cv2 import ximgproc  # noqa: F401
    except ImportError as error:
        raise OptionError(
            f"selective search cannot be imported ({error}): {install('proposals')}"
        ) from error


def selective_search(picture: Image.Image, mode: Mode = "fast", seed: int = 0) -> list[Box]:
    """Search a picture with OpenCV's selective search (Uijlings et al. 2013).

    Args:
        picture: RGB; one with a side longer than 500 pixels is searched at that size.
        mode: "fast" for two colour spaces, "quality" for more of them and more scales.
        seed: Of the part of the ranking that is drawn at random, as its authors have it.

    Returns:
        Candidates in pixels of the picture, the best-ranked first.

    Raises:
        OptionError: The mode is unknown, or OpenCV is missing.
    """
    if mode not in get_args(Mode):
        raise OptionError(f'mode "{mode}" is unknown; there are {", ".join(get_args(Mode))}')
    require_opencv()
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
    candidates = np.asarray(search.process()).tolist()
    across, down = picture.width / size[0], picture.height / size[1]
    return [
        (
            int(left * across),
            int(top * down),
            min(round((left + width) * across), picture.width),
            min(round((top + height) * down), picture.height),
        )
        for left, top, width, height in candidates
    ]


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _contains(box: Box, peak: Peak) -> bool:
    return box[0] <= peak.x < box[2] and box[1] <= peak.y < box[3]

"""How good a saliency map is: whether the classifier's decision follows it, where its energy lies.

All values are percentages. Definitions that go by one name differ between papers and libraries, so
each metric here has one definition in words, which results carry along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d, gaussian_filter1d

from ccam_deploy.arrays import Classes, Doubles, Floats
from ccam_deploy.errors import OptionError

Kind = Literal["deletion", "insertion"]

TOLERANCE = 15
"""Pixels of the network's input by which pointing-15 may miss a box."""

_BLUR_SIZE = 11
_BLUR_SIGMA = 5.0


@dataclass(frozen=True)
class Metric:
    """A metric's meaning. boxes: it needs the objects' boxes.   high: a high value is good."""

    definition: str
    high: bool
    boxes: bool = False


METRICS = {
    "average-drop": Metric(
        "100·relu(y − o)/y, with y the softmax probability of the explained class for the image "
        "and o that for the image times the map scaled to [0, 1] (Ha & Youn 2022, eq. 26); "
        "0 where y is 0",
        high=False,
    ),
    "average-increase": Metric(
        "100 where o > y, else 0, with y and o as for average-drop (eq. 27, whose inequality is "
        "printed the other way round)",
        high=True,
    ),
    "deletion": Metric("area under the deletion curve of the protocol", high=False),
    "insertion": Metric("area under the insertion curve of the protocol", high=True),
    "overall": Metric("insertion − deletion (eq. 28)", high=True),
    "proportion": Metric(
        "share of the map's sum inside the union of the boxes (eq. 29), those of the data set's "
        "class, whichever is explained; a pixel is inside where its centre is; 0 for a map of "
        "zeros",
        high=True,
        boxes=True,
    ),
    "pointing": Metric(
        "100 where the map's highest pixel, the first in row-major order among equals, lies in a "
        "box, else 0; boxes as for proportion; 0 for a map of zeros",
        high=True,
        boxes=True,
    ),
    f"pointing-{TOLERANCE}": Metric(
        f"pointing with a highest pixel up to {TOLERANCE} pixels, of the network's input, from a "
        "box's nearest pixel",
        high=True,
        boxes=True,
    ),
}


@dataclass(frozen=True)
class CurveProtocol:
    """How Deletion and Insertion change an image, step by step.

    rows: how many rows' worth of pixels change at each step.
    blurred: insertion starts from the blurred image; else from zeros.
    predicted: the curves follow the classifier's best class; else the explained one.
    """

    name: str
    definition: str
    blurred: bool
    predicted: bool
    rows: int = 8


_CURVES = (
    "The most salient pixels first, equal ones in row-major order, as many a step as 8 rows have "
    "(the last step takes what is left); deletion sets them to 0 in the normalised image; "
)
_AREA = "; area = (sum − first/2 − last/2)/(n − 1) of the n probabilities"

PROTOCOLS = {
    "paper": CurveProtocol(
        "paper",
        f"{_CURVES}insertion starts from zeros; softmax probability of the explained class{_AREA} "
        "(Ha & Youn 2022; it names no formula for the area, this is RISE's)",
        blurred=False,
        predicted=False,
    ),
    "rise": CurveProtocol(
        "rise",
        f"{_CURVES}insertion starts from the image blurred by an {_BLUR_SIZE}×{_BLUR_SIZE} "
        f"Gaussian of sigma {_BLUR_SIGMA:g}; softmax probability of the best class of the whole "
        f"image{_AREA} (Petsiuk et al. 2018)",
        blurred=True,
        predicted=True,
    ),
}


class Scorer(Protocol):
    """The one call of the classifier that metrics need; see engines.Classifier."""

    def masked_logits(self, images: Floats, masks: Floats, owner: NDArray[np.int64]) -> Floats:
        """Logits [N, classes] of images times masks [N, H, W]; owner [N] names each one's image."""
        ...


def check_metrics(names: Sequence[str], protocol: str) -> None:
    """Raise OptionError for a metric or protocol that does not exist."""
    for name in names:
        if name not in METRICS:
            raise OptionError(f'metric "{name}" is unknown; there are {", ".join(METRICS)}')
    if protocol not in PROTOCOLS:
        raise OptionError(f'protocol "{protocol}" is unknown; there are {", ".join(PROTOCOLS)}')


def probabilities(logits: Floats, classes: Classes) -> Doubles:
    """The softmax probability [N] of a class of each row: logits [N, all], classes [N]."""
    wide = logits.astype(np.float64)
    exponents = np.exp(wide - wide.max(axis=1, keepdims=True))
    chosen: Doubles = exponents[np.arange(len(classes)), classes] / exponents.sum(axis=1)
    return chosen


def masked_logits(scorer: Scorer, images: Floats, masks: Floats, chunk: int) -> Floats:
    """Logits [B, classes] of images, each times its mask.

    images: [B, C, H, W], preprocessed.   masks: [B, H, W] in [0, 1].
    chunk: how many images go through the engine at a time.
    """
    found = []
    for start in range(0, len(images), chunk):
        part = slice(start, start + chunk)
        owner = np.arange(len(images[part]), dtype=np.int64)
        found.append(scorer.masked_logits(images[part], masks[part], owner))
    return np.concatenate(found)


def average_drop(before: Doubles, after: Doubles) -> Doubles:
    """Drop [B] in percent, of probabilities [B] of the image and of the masked image (eq. 26)."""
    drops = np.maximum(before - after, 0)
    return 100 * np.divide(drops, before, out=np.zeros_like(drops), where=before > 0)


def average_increase(before: Doubles, after: Doubles) -> Doubles:
    """100 where the masked image's probability is above the image's, else 0 (eq. 27): [B]."""
    return np.where(after > before, 100.0, 0.0)


def ranks(saliency: Floats) -> NDArray[np.int64]:
    """The place of each pixel of maps [B, H, W] in falling order of saliency, from 0.

    Equal pixels keep their row-major order.
    """
    flat = saliency.reshape(len(saliency), -1)
    order = np.argsort(-flat, axis=1, kind="stable")
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.arange(flat.shape[1])[None], axis=1)
    return places.reshape(saliency.shape).astype(np.int64, copy=False)


def curves(
    scorer: Scorer,
    images: Floats,
    saliency: Floats,
    classes: Classes,
    protocol: CurveProtocol,
    kind: Kind,
    chunk: int,
) -> Doubles:
    """The probability of each image's class as pixels are deleted or inserted.

    images: [B, C, H, W], preprocessed.   saliency: [B, H, W].   classes: [B].
    chunk: how many changed images exist, and go through the engine, at a time.
    Returns [B, n], from no pixel changed to all, with n = 1 + ceil(H / rows of a step).
    """
    count, _, height, width = images.shape
    step = protocol.rows * width
    points = 1 + -(-height * width // step)
    places = ranks(saliency)
    start = blur(images) if kind == "insertion" and protocol.blurred else None
    found = np.empty(count * points)
    for begin in range(0, len(found), chunk):
        owner, done = np.divmod(np.arange(begin, min(begin + chunk, len(found))), points)
        changed = places[owner] < done[:, None, None] * step
        if start is None:
            shown = changed if kind == "insertion" else ~changed
            logits = scorer.masked_logits(images, shown.astype(np.float32), owner)
        else:
            mixed = np.where(changed[:, None], images[owner], start[owner])
            whole = np.ones(changed.shape, np.float32)
            logits = scorer.masked_logits(mixed, whole, np.arange(len(mixed), dtype=np.int64))
        found[begin : begin + chunk] = probabilities(logits, classes[owner])
    return found.reshape(count, points)


def area(points: Doubles) -> Doubles:
    """Area under curves [B, n] over [0, 1] by trapezoids: [B]."""
    inner = points.sum(axis=1) - points[:, 0] / 2 - points[:, -1] / 2
    areas: Doubles = inner / (points.shape[1] - 1)
    return areas


def blur(images: Floats) -> Floats:
    """Images [B, C, H, W] blurred as RISE's insertion starts; zeros lie beyond the border.

    RISE makes its 11×11 kernel by filtering a single 1 with SciPy, whose default reflects at the
    border: the Gaussian's tails are folded back into the window.
    """
    impulse = np.zeros(_BLUR_SIZE)
    impulse[_BLUR_SIZE // 2] = 1
    kernel = gaussian_filter1d(impulse, _BLUR_SIGMA)
    across = correlate1d(images, kernel, axis=3, mode="constant")
    blurred: Floats = correlate1d(across, kernel, axis=2, mode="constant")
    return blurred


def box_mask(boxes: Doubles, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels [H, W] whose centre lies in one of the boxes [K, 4].

    A box is left, top, right, bottom, right and bottom exclusive; it may reach over the border.
    """
    y, x = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    inside = np.zeros(size, np.bool_)
    for left, top, right, bottom in boxes:
        inside |= ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
    return inside


def proportion(saliency: Floats, boxes: Doubles) -> float:
    """Share in percent of a map's [H, W] sum that lies in the union of boxes [K, 4] (eq. 29).

    NaN where the boxes hold no pixel.
    """
    inside = box_mask(boxes, (saliency.shape[0], saliency.shape[1]))
    if not inside.any():
        return float("nan")
    total = saliency.sum(dtype=np.float64)
    return float(100 * saliency[inside].sum(dtype=np.float64) / total) if total else 0.0


def pointing(saliency: Floats, boxes: Doubles, tolerance: int = 0) -> float:
    """100 where a map's [H, W] highest pixel lies in one of the boxes [K, 4], else 0.

    tolerance: how far, in pixels, it may be from the nearest pixel of a box.
    NaN where the boxes hold no pixel.
    """
    inside = box_mask(boxes, (saliency.shape[0], saliency.shape[1]))
    if not inside.any():
        return float("nan")
    if not saliency.any():
        return 0.0
    y, x = np.unravel_index(int(saliency.argmax()), saliency.shape)
    rows, columns = np.nonzero(inside)
    nearest = ((rows - y) ** 2 + (columns - x) ** 2).min()
    return 100.0 if nearest <= tolerance**2 else 0.0

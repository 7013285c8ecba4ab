"""Metrics of a saliency map: does the classifier's decision follow it, and where does it lie?

All values are percentages. Papers and libraries define metrics of one name in several ways, so each
metric here has one definition in words, and results carry it along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d, gaussian_filter1d

from ccam_deploy.arrays import Classes, Doubles, Floats
from ccam_deploy.bundle.manifest import Activation
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.errors import OptionError
from ccam_deploy.methods.base import require_finite_masked
from ccam_deploy.methods.scores import probabilities

CurveName = Literal["deletion", "insertion"]

TOLERANCE = 15
"""Pixels of the network's input by which pointing-15 may miss a box."""

_BLUR_SIZE = 11
_BLUR_SIGMA = 5.0


@dataclass(frozen=True)
class Metric:
    """The meaning of a metric.

    Attributes:
        definition: What it measures, in words.
        high: Whether a high value is good.
        boxes: Whether it needs the objects' boxes.
    """

    definition: str
    high: bool
    boxes: bool = False


METRICS = {
    "average-drop": Metric(
        "100·relu(y − o)/y, with y the probability of the explained class for the image "
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

    Attributes:
        name: The protocol's name.
        definition: What it does, in words.
        blurred: Whether insertion starts from the blurred image, and not from zeros.
        predicted: Whether curves follow the classifier's best class, and not the explained one.
        rows: How many rows' worth of pixels change at each step.
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
        f"{_CURVES}insertion starts from zeros; probability of the explained class{_AREA} "
        "(Ha & Youn 2022; it names no formula for the area, this is RISE's)",
        blurred=False,
        predicted=False,
    ),
    "rise": CurveProtocol(
        "rise",
        f"{_CURVES}insertion starts from the image blurred by an {_BLUR_SIZE}×{_BLUR_SIZE} "
        f"Gaussian of sigma {_BLUR_SIGMA:g}; probability of the best class of the whole "
        f"image{_AREA} (Petsiuk et al. 2018)",
        blurred=True,
        predicted=True,
    ),
}


class Scorer(Protocol):
    """The one call of the classifier that metrics need; see engines.Classifier."""

    def masked_logits(self, images: Floats, masks: Floats, owner: Classes) -> Floats:
        """Compute logits [N, classes] of images[owner[n]] times masks[n], masks [N, H, W]."""
        ...


def reject_unknown(names: Sequence[str], protocol: str) -> None:
    """Raise OptionError for a metric or protocol that does not exist."""
    for name in names:
        if name not in METRICS:
            raise OptionError(f'metric "{name}" is unknown; there are {", ".join(METRICS)}')
    if protocol not in PROTOCOLS:
        raise OptionError(f'protocol "{protocol}" is unknown; there are {", ".join(PROTOCOLS)}')


def class_probabilities(logits: Floats, classes: Classes, activation: Activation) -> Doubles:
    """Compute the probability of one class of each row.

    Args:
        logits: [N, all classes] float32.
        classes: [N] int64.
        activation: What makes probabilities of logits.

    Returns:
        [N] float64; in [0, 1] unless the activation is "none".
    """
    every = probabilities(logits.astype(np.float64), activation)
    return every[np.arange(len(classes)), classes]


def masked_logits(scorer: Scorer, images: Floats, masks: Floats, chunk: int) -> Floats:
    """Compute the logits of images, each times its own mask.

    Args:
        scorer: The classifier.
        images: [B, C, H, W] float32, preprocessed.
        masks: [B, H, W] float32 in [0, 1].
        chunk: How many images go through the engine at a time.

    Returns:
        [B, classes] float32.
    """
    parts = []
    for rows in row_chunks(len(images), chunk):
        owner = np.arange(rows.stop - rows.start, dtype=np.int64)
        parts.append(scorer.masked_logits(images[rows], masks[rows], owner))
        require_finite_masked(parts[-1])
    return np.concatenate(parts)


def average_drop(before: Doubles, after: Doubles) -> Doubles:
    """Compute the drop of each image's probability (Ha & Youn 2022, eq. 26).

    Args:
        before: [B] float64, the probability of the class for the image.
        after: [B] float64, the same for the image times its map.

    Returns:
        [B] float64 in percent of `before`; 0 where `before` is 0.
    """
    drops = np.maximum(before - after, 0)
    return 100 * np.divide(drops, before, out=np.zeros_like(drops), where=before > 0)


def average_increase(before: Doubles, after: Doubles) -> Doubles:
    """Tell which images' probability increases (Ha & Youn 2022, eq. 27).

    Args:
        before: [B] float64, the probability of the class for the image.
        after: [B] float64, the same for the image times its map.

    Returns:
        [B] float64: 100 where `after` is above `before`, else 0.
    """
    return np.where(after > before, 100.0, 0.0)


def ranks(saliency: Floats) -> NDArray[np.int64]:
    """Rank the pixels of maps [B, H, W] in falling order of saliency, from 0: [B, H, W] int64.

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
    curve: CurveName,
    chunk: int,
    activation: Activation = "softmax",
) -> Doubles:
    """Compute the probability of each image's class as pixels are deleted or inserted.

    Args:
        scorer: The classifier.
        images: [B, C, H, W] float32, preprocessed.
        saliency: [B, H, W] float32.
        classes: [B] int64, the class whose probability is followed.
        protocol: How an image changes.
        curve: Whether pixels are deleted or inserted.
        chunk: How many changed images exist, and go through the engine, at a time.
        activation: What makes probabilities of logits.

    Returns:
        [B, n] float64, from no pixel changed to all, n = 1 + ceil(H / protocol.rows).
    """
    count, _, height, width = images.shape
    step = protocol.rows * width
    points = 1 + -(-height * width // step)
    places = ranks(saliency)
    start = blur(images) if curve == "insertion" and protocol.blurred else None
    values = np.empty(count * points)
    for rows in row_chunks(len(values), chunk):
        owner, done = np.divmod(np.arange(rows.start, rows.stop), points)
        changed = places[owner] < done[:, None, None] * step
        if start is None:
            shown = changed if curve == "insertion" else ~changed
            logits = scorer.masked_logits(images, shown.astype(np.float32), owner)
        else:
            mixed = np.where(changed[:, None], images[owner], start[owner])
            whole = np.ones(changed.shape, np.float32)
            logits = scorer.masked_logits(mixed, whole, np.arange(len(mixed), dtype=np.int64))
        require_finite_masked(logits)
        values[rows] = class_probabilities(logits, classes[owner], activation)
    return values.reshape(count, points)


def area(points: Doubles) -> Doubles:
    """Compute the area [B] under curves [B, n] over [0, 1] by trapezoids."""
    inner = points.sum(axis=1) - points[:, 0] / 2 - points[:, -1] / 2
    areas: Doubles = inner / (points.shape[1] - 1)
    return areas


def blur(images: Floats) -> Floats:
    """Blur images [B, C, H, W] as RISE's insertion starts, with zeros beyond the border.

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
    """Mark the pixels whose centre lies in a box.

    Args:
        boxes: [K, 4] float64: left, top, right, bottom in pixels, right and bottom exclusive; a
            box may reach over the border.
        size: Height and width of the image.

    Returns:
        [height, width] bool.
    """
    y, x = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    inside = np.zeros(size, np.bool_)
    for left, top, right, bottom in boxes:
        inside |= ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
    return inside


def proportion(saliency: Floats, boxes: Doubles) -> float:
    """Compute the share of a map's sum inside the boxes (Ha & Youn 2022, eq. 29).

    Args:
        saliency: [H, W] float32, not negative.
        boxes: [K, 4] float64, see box_mask.

    Returns:
        Percent; 0 for a map of zeros, NaN where the boxes hold no pixel.
    """
    inside = box_mask(boxes, (saliency.shape[0], saliency.shape[1]))
    if not inside.any():
        return float("nan")
    total = saliency.sum(dtype=np.float64)
    return float(100 * saliency[inside].sum(dtype=np.float64) / total) if total else 0.0


def pointing(saliency: Floats, boxes: Doubles, tolerance: int = 0) -> float:
    """Tell whether a map's highest pixel lies in a box.

    Args:
        saliency: [H, W] float32, not negative.
        boxes: [K, 4] float64, see box_mask.
        tolerance: How many pixels it may be away from the nearest pixel of a box.

    Returns:
        100 or 0; 0 for a map of zeros, NaN where the boxes hold no pixel.
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

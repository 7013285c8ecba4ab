"""The metrics of a group of images and a method's maps of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from ccam_deploy.arrays import Classes, Doubles, Floats
from ccam_deploy.bundle.manifest import Activation
from ccam_deploy.quality import metrics
from ccam_deploy.quality.datasets import Item
from ccam_deploy.quality.metrics import TOLERANCE, CurveProtocol, Scorer
from ccam_deploy.quality.results import CURVES


@dataclass(frozen=True)
class OpenedImage:
    """An image that was read.

    Attributes:
        place: Its place in the data set.
        item: Its entry in the data set.
        image: [C, H, W] float32, preprocessed.
        boxes: [K, 4] float64, the objects' boxes in pixels of the network's input.
    """

    place: int
    item: Item
    image: Floats
    boxes: Doubles


@dataclass(frozen=True)
class Group:
    """Images that are measured together, with what all methods share.

    Attributes:
        opened: The images one by one.
        images: [B, C, H, W] float32, preprocessed.
        targets: [B] int64, the classes that are explained.
        predicted: [B] int64, the classifier's best classes.
        before: [B] float64, the probability of the target for the whole image.
    """

    opened: tuple[OpenedImage, ...]
    images: Floats
    targets: Classes
    predicted: Classes
    before: Doubles


@dataclass(frozen=True)
class Scoring:
    """How a group's maps are measured.

    Attributes:
        scorer: The classifier.
        metrics: Names among metrics.METRICS.
        protocol: How the curves change an image.
        chunk: How many images go through an engine at a time.
        activation: What makes probabilities of logits.
    """

    scorer: Scorer
    metrics: Collection[str]
    protocol: CurveProtocol
    chunk: int
    activation: Activation = "softmax"

    def score(
        self, group: Group, saliency: Floats
    ) -> tuple[dict[str, Doubles], dict[str, Doubles]]:
        """Measure maps.

        Args:
            group: The images.
            saliency: [B, H, W] float32 in [0, 1], their maps.

        Returns:
            The values [B] of each metric in percent, and the probabilities [B, n] along each curve
            that a metric needs.
        """
        curves = self._curves(group, saliency)
        values = self._masked(group, saliency) | self._localised(group, saliency)
        values |= {curve: 100 * metrics.area(points) for curve, points in curves.items()}
        if "overall" in self.metrics:
            values["overall"] = values["insertion"] - values["deletion"]
        return {name: values[name] for name in self.metrics}, curves

    def _masked(self, group: Group, saliency: Floats) -> dict[str, Doubles]:
        if not {"average-drop", "average-increase"} & set(self.metrics):
            return {}
        logits = metrics.masked_logits(self.scorer, group.images, saliency, self.chunk)
        after = metrics.class_probabilities(logits, group.targets, self.activation)
        return {
            "average-drop": metrics.average_drop(group.before, after),
            "average-increase": metrics.average_increase(group.before, after),
        }

    def _curves(self, group: Group, saliency: Floats) -> dict[str, Doubles]:
        classes = group.predicted if self.protocol.predicted else group.targets
        needed = [curve for curve in CURVES if {curve, "overall"} & set(self.metrics)]
        return {
            curve: metrics.curves(
                self.scorer,
                group.images,
                saliency,
                classes,
                self.protocol,
                curve,
                self.chunk,
                self.activation,
            )
            for curve in needed
        }

    def _localised(self, group: Group, saliency: Floats) -> dict[str, Doubles]:
        boxes = [opened.boxes for opened in group.opened]
        pairs = list(zip(saliency, boxes, strict=True))
        near = f"pointing-{TOLERANCE}"
        return {
            "proportion": np.array([metrics.proportion(*pair) for pair in pairs]),
            "pointing": np.array([metrics.pointing(*pair) for pair in pairs]),
            near: np.array([metrics.pointing(*pair, TOLERANCE) for pair in pairs]),
        }

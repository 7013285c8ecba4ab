"""Integrated gradients (Sundararajan et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Doubles, Floats
from ccam_deploy.engines import Classifier
from ccam_deploy.errors import OptionError
from ccam_deploy.methods.base import Batch
from ccam_deploy.methods.image_gradient import (
    MOST_STEPS,
    Channels,
    PixelAttribution,
    mean_gradient,
    require_choice,
)

Rule = Literal["midpoint", "trapezoid", "gauss-legendre"]
Baseline = Literal["zero", "black", "grey", "white"]
_MOST_NODES = 1_000
_LEVELS: dict[Baseline, float] = {"black": 0.0, "grey": 0.5, "white": 1.0}


@dataclass(frozen=True)
class IntegratedGradients(PixelAttribution):
    """Integrates the gradient on the path from a baseline (Sundararajan et al. 2017, eq. 1, 3).

    The values of an image add up to the increase of the logit over the baseline, except for the
    error of the quadrature.

    Attributes:
        steps: How many gradients are taken between baseline and image.
        rule: Where they are taken: "midpoint" in the middle of equal parts, "trapezoid" at their
            ends, "gauss-legendre" at the nodes of Gauss's quadrature, as in Captum.
        baseline: Where the path starts: "zero" values of the normalised input, as in Captum (the
            mean colour of most networks' training images); or "black", "grey" or "white" pixels.
        channels: How a pixel's C values become one: the sum of "absolute" values as in PAIR's
            saliency library, their "maximum", the sum of the "positive" values, or the "sum" of
            all, which has a sign.
    """

    name = "integrated-gradients"
    steps: int = 50
    rule: Rule = "midpoint"
    baseline: Baseline = "zero"
    channels: Channels = "absolute"

    def __post_init__(self) -> None:
        require_steps(self.steps, self.rule)
        require_choice("baseline", self.baseline, get_args(Baseline))
        require_choice("channels", self.channels, get_args(Channels))

    def attribute(self, classifier: Classifier, batch: Batch) -> Floats:
        """Integrate the gradient of each pair's pixels; see PixelAttribution."""
        start = baseline_of(batch, self.baseline)
        return integrate(classifier, batch, start, self.steps, self.rule)


def require_steps(steps: int, rule: str) -> None:
    """Refuse an unknown rule, or a number of steps that it cannot have.

    Raises:
        OptionError: The rule is unknown, or the number of steps is out of range.
    """
    require_choice("rule", rule, get_args(Rule))
    least = 2 if rule == "trapezoid" else 1
    most = _MOST_NODES if rule == "gauss-legendre" else MOST_STEPS
    if not least <= steps <= most:
        raise OptionError(f"steps is {steps}; with rule {rule} it must be {least} to {most}")


def baseline_of(batch: Batch, name: Baseline) -> Floats:
    """Make a baseline.

    Args:
        batch: The images, whose normalisation the baseline gets.
        name: The baseline's name.

    Returns:
        [C, 1, 1] float32, normalised as the images are.
    """
    if name == "zero":
        return np.zeros((batch.images.shape[1], 1, 1), np.float32)
    return batch.colour(_LEVELS[name])


def integrate(
    classifier: Classifier, batch: Batch, start: Floats, steps: int, rule: Rule
) -> Floats:
    """Integrate the gradient from a baseline to the image of each pair.

    Args:
        classifier: The engines.
        batch: The images and pairs.
        start: [C, 1, 1] float32, the baseline.
        steps: How many gradients are taken.
        rule: Where they are taken.

    Returns:
        [P, C, H, W] float32.
    """
    places, weights = _quadrature(steps, rule)
    path = batch.images - start
    shares = places.astype(np.float32)

    def inputs(pairs: NDArray[np.intp], step: NDArray[np.intp]) -> Floats:
        points: Floats = start + shares[step][:, None, None, None] * path[batch.owner[pairs]]
        return points

    return path[batch.owner] * mean_gradient(classifier, batch, weights, inputs)


def _quadrature(steps: int, rule: Rule) -> tuple[Doubles, Doubles]:
    """The nodes [steps] of a rule on [0, 1], and their weights [steps]."""
    if rule == "midpoint":
        return (np.arange(steps) + 0.5) / steps, np.full(steps, 1 / steps)
    if rule == "gauss-legendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return (nodes + 1) / 2, weights / 2
    weights = np.full(steps, 1 / (steps - 1))
    weights[[0, -1]] /= 2
    return np.linspace(0, 1, steps), weights

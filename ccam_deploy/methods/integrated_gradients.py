"""Integrated gradients (Sundararajan et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Floats
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
    """The gradient's mean on the way from a baseline, times the way (Sundararajan et al. 2017).

    The values of an image add up to the logit's increase over the baseline, but for the error of
    the sum that stands for the integral.

    Attributes:
        steps: How many gradients are taken between baseline and image.
        rule: Where they are taken: "midpoint" in the middle of equal parts, "trapezoid" at their
            ends, "gauss-legendre" at the nodes of Gauss's quadrature, as in Captum.
        baseline: Where the path starts: "zero" in the network's own input, as in Captum, which is
            the mean colour of most networks' training images; or "black", "grey" or "white" pixels.
        channels: How a pixel's C values become one: the sum of "absolute" values as in PAIR's
            saliency library, their "maximum", the sum of the "positive" ones, or the "sum", with
            its sign.

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
        """The value of each pair's pixels; see the class."""
        start = baseline_of(batch, self.baseline)
        return integrate(classifier, batch, start, self.steps, self.rule)


def require_steps(steps: int, rule: str) -> None:
    """Raise OptionError for a number of steps or a rule that there is not."""
    require_choice("rule", rule, get_args(Rule))
    least = 2 if rule == "trapezoid" else 1
    most = _MOST_NODES if rule == "gauss-legendre" else MOST_STEPS
    if not least <= steps <= most:
        raise OptionError(f"steps is {steps}; with rule {rule} it must be {least} to {most}")


def baseline_of(batch: Batch, name: Baseline) -> Floats:
    """A baseline [C, 1, 1] float32 in the network's input space."""
    if name == "zero":
        return np.zeros((batch.images.shape[1], 1, 1), np.float32)
    return batch.colour(_LEVELS[name])


def integrate(
    classifier: Classifier, batch: Batch, start: Floats, steps: int, rule: Rule
) -> Floats:
    """Integrated gradients [P, C, H, W] float32 of each pair, from a baseline [C, 1, 1]."""
    places, weights = _quadrature(steps, rule)
    way = batch.images - start
    shares = places.astype(np.float32)

    def between(pairs: NDArray[np.intp], step: NDArray[np.intp]) -> Floats:
        found: Floats = start + shares[step][:, None, None, None] * way[batch.owner[pairs]]
        return found

    return way[batch.owner] * mean_gradient(classifier, batch, weights, between)


def _quadrature(steps: int, rule: Rule) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where on [0, 1] a function is taken [steps], and the weight of each value [steps]."""
    if rule == "midpoint":
        return (np.arange(steps) + 0.5) / steps, np.full(steps, 1 / steps)
    if rule == "gauss-legendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return (nodes + 1) / 2, weights / 2
    weights = np.full(steps, 1 / (steps - 1))
    weights[[0, -1]] /= 2
    return np.linspace(0, 1, steps), weights

"""Methods on the gradient of the image: integrated gradients, SmoothGrad, guided backpropagation.

They need a bundle exported with --gradients. The gradient is that of the logit. Steps and samples
of all pairs go through the engine together, a chunk at a time. P counts (image, class) pairs,
C channels of the image.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.engines import Classifier
from ccam_deploy.errors import OptionError
from ccam_deploy.methods.base import Batch, Floats, Method, MethodResult, Stopwatch

Channels = Literal["absolute", "maximum", "positive", "sum"]
Rule = Literal["midpoint", "trapezoid", "gauss-legendre"]
Baseline = Literal["zero", "black", "grey", "white"]
_MOST_STEPS = 100_000
_MOST_NODES = 1_000
_LEVELS: dict[Baseline, float] = {"black": 0.0, "grey": 0.5, "white": 1.0}


@dataclass(frozen=True)
class IntegratedGradientsOptions:
    """Options of integrated gradients.

    steps: how many gradients are taken between baseline and image.
    rule: where: "midpoint" in the middle of equal parts, "trapezoid" at their ends,
        "gauss-legendre" at the nodes of Gauss's quadrature, as in Captum.
    baseline: where the path starts: "zero" in the network's own input, as in Captum, which is
        the mean colour of most networks' training images; or "black", "grey" or "white" pixels.
    channels: one value of each pixel's C: the sum of "absolute" values as in PAIR's saliency
        library, their "maximum", the sum of the "positive" ones, or the "sum", with its sign.
    """

    steps: int = 50
    rule: Rule = "midpoint"
    baseline: Baseline = "zero"
    channels: Channels = "absolute"

    def __post_init__(self) -> None:
        check_steps(self.steps, self.rule)
        check_name("baseline", self.baseline, get_args(Baseline))
        check_name("channels", self.channels, get_args(Channels))


@dataclass(frozen=True)
class SmoothGradOptions:
    """Options of SmoothGrad.

    samples: how many noisy copies of the image.   noise: their standard deviation, as a share of
        the range of the image's values.   seed: of the noise, which is the same for every image.
    square: average squared gradients instead (SmoothGrad-squared).
    channels: see IntegratedGradientsOptions; the paper shows the "maximum", its code "absolute".
    """

    samples: int = 50
    noise: float = 0.15
    seed: int = 0
    square: bool = False
    channels: Channels = "absolute"

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= _MOST_STEPS:
            raise OptionError(f"samples is {self.samples}; it must be 1 to {_MOST_STEPS}")
        if not 0 <= self.noise < np.inf:
            raise OptionError(f"noise is {self.noise}; it must be finite and at least 0")
        if self.seed < 0:
            raise OptionError(f"seed is {self.seed}; it must be at least 0")
        check_name("channels", self.channels, get_args(Channels))


@dataclass(frozen=True)
class GuidedBackpropOptions:
    """Options of guided backpropagation.

    channels: see IntegratedGradientsOptions; Captum leaves all C values, with their signs.
    """

    channels: Channels = "absolute"

    def __post_init__(self) -> None:
        check_name("channels", self.channels, get_args(Channels))


Options = TypeVar("Options", IntegratedGradientsOptions, SmoothGradOptions, GuidedBackpropOptions)


class _Attribution(Method[Options]):
    """A value for each channel of each pixel, and of these one for the pixel.

    guided: whether it is the gradient through ReLUs that pass back its positive part.
    """

    guided: ClassVar[bool] = False

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain every pair of a batch; see Method."""
        with clock.stage("gradient"), np.errstate(over="ignore", invalid="ignore"):
            attributions = self.attribute(classifier, batch)
        with clock.stage("combine"):
            return MethodResult.of_maps(reduce_channels(attributions, self.options.channels))

    def check(self, classifier: Classifier, batch: Batch) -> None:
        """See that there is a gradient of the image; see Method."""
        classifier.input_gradient(batch.images, batch.one_hot, self.guided)

    @abstractmethod
    def attribute(self, classifier: Classifier, batch: Batch) -> Floats:
        """The value of each pair's pixels [P, C, H, W] float32."""


class IntegratedGradients(_Attribution[IntegratedGradientsOptions]):
    """The gradient's mean on the way from a baseline, times the way (Sundararajan et al. 2017).

    The values of an image add up to the logit's increase over the baseline, but for the error of
    the sum that stands for the integral.
    """

    name = "integrated-gradients"
    options_type = IntegratedGradientsOptions

    def attribute(self, classifier: Classifier, batch: Batch) -> Floats:
        """The value of each pair's pixels; see the class."""
        start = baseline_of(batch, self.options.baseline)
        return integrate(classifier, batch, start, self.options.steps, self.options.rule)


class SmoothGrad(_Attribution[SmoothGradOptions]):
    """The gradient's mean over noisy copies of the image (Smilkov et al. 2017)."""

    name = "smoothgrad"
    options_type = SmoothGradOptions

    def attribute(self, classifier: Classifier, batch: Batch) -> Floats:
        """The mean gradient of each pair's pixels; see the class."""
        shape = batch.images.shape[1:]
        ranges = np.ptp(batch.images.reshape(len(batch.images), -1), axis=1)
        deviations = (np.float32(self.options.noise) * ranges)[:, None, None, None]

        def noisy(pairs: NDArray[np.intp], samples: NDArray[np.intp]) -> Floats:
            owner = batch.owner[pairs]
            draws = [np.random.default_rng((self.options.seed, n)) for n in samples]
            noise = np.stack([draw.standard_normal(shape, np.float32) for draw in draws])
            found: Floats = batch.images[owner] + deviations[owner] * noise
            return found

        weights = np.full(self.options.samples, 1 / self.options.samples)
        return _mean_gradient(classifier, batch, weights, noisy, self.options.square)


class GuidedBackprop(_Attribution[GuidedBackpropOptions]):
    """The gradient through ReLUs that pass back its positive part (Springenberg et al. 2015).

    Other activations keep their own derivative; a network without ReLU is refused.
    """

    name = "guided-backprop"
    options_type = GuidedBackpropOptions
    guided = True

    def attribute(self, classifier: Classifier, batch: Batch) -> Floats:
        """The guided gradient of each pair's pixels; see the class."""
        parts = [
            classifier.input_gradient(
                batch.images[batch.owner[start : start + batch.chunk]],
                batch.one_hot[start : start + batch.chunk],
                self.guided,
            )
            for start in range(0, len(batch.owner), batch.chunk)
        ]
        return np.concatenate(parts)


def check_steps(steps: int, rule: str) -> None:
    """Raise OptionError for a number of steps or a rule that there is not."""
    check_name("rule", rule, get_args(Rule))
    least = 2 if rule == "trapezoid" else 1
    most = _MOST_NODES if rule == "gauss-legendre" else _MOST_STEPS
    if not least <= steps <= most:
        raise OptionError(f"steps is {steps}; with rule {rule} it must be {least} to {most}")


def check_name(option: str, value: str, known: tuple[str, ...]) -> None:
    """Raise OptionError for a value that is not among those of an option."""
    if value not in known:
        raise OptionError(f'{option} is "{value}"; it must be {", ".join(known)}')


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

    return way[batch.owner] * _mean_gradient(classifier, batch, weights, between)


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


def reduce_channels(values: Floats, how: Channels) -> Floats:
    """One value for each pixel: [P, C, H, W] to [P, H, W] float32."""
    if how == "sum":
        found: Floats = values.sum(axis=1)
    elif how == "positive":
        found = np.maximum(values, 0).sum(axis=1)
    elif how == "maximum":
        found = np.abs(values).max(axis=1)
    else:
        found = np.abs(values).sum(axis=1)
    return found


def _mean_gradient(
    classifier: Classifier,
    batch: Batch,
    weights: NDArray[np.float64],
    inputs: Callable[[NDArray[np.intp], NDArray[np.intp]], Floats],
    square: bool = False,
) -> Floats:
    """The weighted sum [P, C, H, W] float32 of the gradients at some inputs of each pair.

    weights: [S] of each input.   inputs: the inputs [N, C, H, W] for N pairs and which of the S.
    """
    total = np.zeros((len(batch.owner), *batch.images.shape[1:]), np.float64)
    one_hot = batch.one_hot
    count = len(weights)
    for first in range(0, len(total) * count, batch.chunk):
        rows = np.arange(first, min(first + batch.chunk, len(total) * count))
        pairs, places = rows // count, rows % count
        gradients = classifier.input_gradient(inputs(pairs, places), one_hot[pairs])
        if square:
            gradients = gradients**2
        for pair, place, gradient in zip(pairs, places, gradients, strict=True):
            total[pair] += weights[place] * gradient
    return total.astype(np.float32)

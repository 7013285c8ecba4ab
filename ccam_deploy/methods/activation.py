"""Methods that weigh feature maps by their gradients: CAM, Grad-CAM, Grad-CAM++ and Layer-CAM.

Each cuts negative values off, if at all, at the feature map's size and upsamples afterwards. The
gradient is that of the logit. P counts (image, class) pairs, C channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from ccam_deploy.engines import Classifier
from ccam_deploy.errors import OptionError
from ccam_deploy.kernels import cpu
from ccam_deploy.methods.base import (
    Batch,
    Floats,
    Method,
    MethodResult,
    Stopwatch,
    not_finite,
    places_of,
)

_SAME = 1e-2
"""How far gradients may differ, relative to the largest, and still count as equal: half precision
rounds, while a head that is not linear changes them by much more."""


@dataclass(frozen=True)
class CAMOptions:
    """Options of CAM.

    layer: the target layer, empty for the final one; the classifier must be linear after it.
    relu: cut negative values off, which the paper does not.
    """

    layer: str = ""
    relu: bool = False


@dataclass(frozen=True)
class GradCAMOptions:
    """Options of Grad-CAM.

    layer: the target layer, empty for the final one.   relu: cut negative values off.
    """

    layer: str = ""
    relu: bool = True


@dataclass(frozen=True)
class GradCAMPlusPlusOptions:
    """Options of Grad-CAM++.

    layer: the target layer, empty for the final one.   relu: cut negative values off.
    epsilon: added to the denominator of alpha, as some programs do against a division by zero;
        here zero denominators are left out instead. It matters: gradients of 1e-3 have squares
        of 1e-6. pytorch-grad-cam adds 1e-6.
    """

    layer: str = ""
    relu: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < np.inf:
            raise OptionError(f"epsilon is {self.epsilon}; it must be finite and at least 0")


@dataclass(frozen=True)
class LayerCAMOptions:
    """Options of Layer-CAM.

    layers: target layers, whose maps are fused by their maximum; empty for the final one alone.
    relu: cut negative values off; needed where there are several layers.
    scaling: where there are several layers, which maps pass through the tanh that lifts small
        values, all but the deepest as published ("shallow"), "all" as in TorchCAM, or "none".
    gamma: how much it lifts them.
    """

    layers: tuple[str, ...] = ()
    relu: bool = True
    scaling: Literal["shallow", "all", "none"] = "shallow"
    gamma: float = 2.0

    def __post_init__(self) -> None:
        if self.scaling not in ("shallow", "all", "none"):
            raise OptionError(f'scaling is "{self.scaling}"; it must be shallow, all or none')
        if not 0 < self.gamma < np.inf:
            raise OptionError(f"gamma is {self.gamma}; it must be finite and above 0")
        if len(self.layers) > 1 and not self.relu:
            raise OptionError("relu is false; the maps of several layers are fused without signs")


Options = TypeVar("Options", CAMOptions, GradCAMOptions, GradCAMPlusPlusOptions)


class _ChannelWeights(Method[Options]):
    """A sum over the channels of one layer, each with a weight of its own."""

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain every pair of a batch; see Method."""
        place = batch.place_of(self.options.layer)
        features, gradients = _differentiate(classifier, batch, clock)
        self._check(classifier, batch, place, gradients[place], clock)
        with clock.stage("combine"), np.errstate(over="ignore", invalid="ignore"):
            weights = self._weights(features[place], gradients[place])
            maps = np.einsum("pc,pcij->pij", weights, features[place])
        return _result(maps, self.options.relu, batch, batch.layers[place], clock)

    @abstractmethod
    def _weights(self, features: Floats, gradients: Floats) -> Floats:
        """The weight of each channel [P, C] float32, from arrays [P, C, h, w] float32."""

    def _check(
        self, classifier: Classifier, batch: Batch, place: int, gradients: Floats, clock: Stopwatch
    ) -> None:
        """Refuse a network that the method is not made for."""


class GradCAM(_ChannelWeights[GradCAMOptions]):
    """Weighs each channel by the mean of its gradient (Selvaraju et al. 2017, eq. 1, 2)."""

    name = "grad-cam"
    options_type = GradCAMOptions

    def _weights(self, features: Floats, gradients: Floats) -> Floats:
        means: Floats = gradients.mean(axis=(2, 3), dtype=np.float64).astype(np.float32)
        return means


class GradCAMPlusPlus(_ChannelWeights[GradCAMPlusPlusOptions]):
    """Weighs each place's positive gradient by its alpha (Chattopadhay et al. 2018, eq. 6, 19).

    Alpha is that of the exponential of the logit, whose second and third derivatives follow from
    the first where the network is piecewise linear.
    """

    name = "grad-cam++"
    options_type = GradCAMPlusPlusOptions

    def _weights(self, features: Floats, gradients: Floats) -> Floats:
        slopes = gradients.astype(np.float64)
        total = features.sum(axis=(2, 3), keepdims=True, dtype=np.float64)
        square = slopes**2
        denominator = 2 * square + total * square * slopes + self.options.epsilon
        alpha = np.divide(square, denominator, where=denominator != 0, out=np.zeros_like(square))
        weights: Floats = np.einsum("pcij,pcij->pc", alpha, np.maximum(slopes, 0))
        return weights.astype(np.float32)


class CAM(_ChannelWeights[CAMOptions]):
    """Weighs each channel by its weight in the classifier's last layer (Zhou et al. 2016, eq. 2).

    The weights are read off the gradient: where the logits are linear in the pooled feature maps,
    each channel's gradient is its weight, shared evenly among the places. That is checked.
    """

    name = "cam"
    options_type = CAMOptions

    def _weights(self, features: Floats, gradients: Floats) -> Floats:
        totals: Floats = gradients.sum(axis=(2, 3), dtype=np.float64).astype(np.float32)
        return totals

    def _check(
        self, classifier: Classifier, batch: Batch, place: int, gradients: Floats, clock: Stopwatch
    ) -> None:
        """See that gradients are equal at all places, and those of an image of zeros the same."""
        classes = np.unique(batch.targets)
        with clock.stage("gradient"):
            zeros = np.zeros((1, *batch.images.shape[1:]), np.float32)
            other = replace(
                batch,
                activations=classifier.backbone(zeros),
                owner=np.zeros(len(classes), np.int64),
                targets=classes,
            )
            _, slopes = _differentiate(classifier, other, clock)
        expected = slopes[place][np.searchsorted(classes, batch.targets), :, :1, :1]
        largest = np.abs(gradients).max(axis=(1, 2, 3), keepdims=True)
        if (np.abs(gradients - expected) > _SAME * largest).any():
            raise OptionError(
                f'cam needs logits that are linear in the mean of "{batch.layers[place]}", and '
                "the gradient shows that this network's are not; grad-cam works for any network"
            )


class LayerCAM(Method[LayerCAMOptions]):
    """Weighs each place of each channel by its positive gradient (Jiang et al. 2021, eq. 6-9)."""

    name = "layer-cam"
    options_type = LayerCAMOptions

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain every pair of a batch; see Method."""
        places = places_of(self.options.layers or batch.layers[-1:], batch.layers)
        features, gradients = _differentiate(classifier, batch, clock)
        results = []
        for place in places:
            with clock.stage("combine"), np.errstate(over="ignore", invalid="ignore"):
                slopes = np.maximum(gradients[place], 0)
                maps = np.einsum("pcij,pcij->pij", slopes, features[place])
            if len(places) > 1:
                maps = self._scale(maps, place == places[-1])
            results.append(_result(maps, self.options.relu, batch, batch.layers[place], clock))
        if len(results) == 1:
            return results[0]
        with clock.stage("combine"):
            return MethodResult.of_maps(np.maximum.reduce([one.raw_saliency for one in results]))

    def _scale(self, maps: Floats, deepest: bool) -> Floats:
        """Bring a layer's maps [P, h, w] to the range that all layers share (eq. 9)."""
        maps = np.maximum(maps, 0)
        highest = maps.max(axis=(1, 2), keepdims=True)
        maps = np.divide(maps, highest, where=highest > 0, out=np.zeros_like(maps))
        if self.options.scaling == "all" or (self.options.scaling == "shallow" and not deepest):
            maps = np.tanh(np.float32(self.options.gamma) * maps)
        return maps


def _differentiate(
    classifier: Classifier, batch: Batch, clock: Stopwatch
) -> tuple[Sequence[Floats], Sequence[Floats]]:
    """Each layer's features and gradients [P, C, h, w]."""
    with clock.stage("gradient"):
        activations = batch.activations.take(batch.owner)
        return activations.features, classifier.gradients(activations, batch.one_hot)


def _result(maps: Floats, relu: bool, batch: Batch, layer: str, clock: Stopwatch) -> MethodResult:
    """Maps [P, h, w] of a layer as a result at the input's size."""
    if not np.isfinite(maps).all():
        raise not_finite(layer)
    with clock.stage("combine"):
        raw = cpu.upsample(np.maximum(maps, 0) if relu else maps, batch.size)
        return MethodResult.of_maps(raw)

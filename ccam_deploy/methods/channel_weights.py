"""What CAM, Grad-CAM and Grad-CAM++ share: a weighted sum of the channels of one layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Classifier
from ccam_deploy.kernels import cpu
from ccam_deploy.methods.base import Batch, Method, MethodResult, Stopwatch, not_finite


@dataclass(frozen=True)
class ChannelWeights(Method):
    """A sum over the channels of one layer, each with its weight.

    Attributes:
        layer: The target layer; empty for the final one.
        relu: Cut negative values off.

    """

    layer: str = ""
    relu: bool = True

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain every pair of a batch; see Method."""
        place = batch.place_of(self.layer)
        features, gradients = layer_gradients(classifier, batch, clock)
        self._check(classifier, batch, place, gradients[place], clock)
        with clock.stage("combine"), np.errstate(over="ignore", invalid="ignore"):
            weights = self._weights(features[place], gradients[place])
            maps = np.einsum("pc,pcij->pij", weights, features[place])
        return upsampled_result(maps, self.relu, batch, batch.layers[place], clock)

    @abstractmethod
    def _weights(self, features: Floats, gradients: Floats) -> Floats:
        """The weight of each channel [P, C] float32, from arrays [P, C, h, w] float32."""

    def _check(
        self, classifier: Classifier, batch: Batch, place: int, gradients: Floats, clock: Stopwatch
    ) -> None:
        """Refuse a network that the method is not made for."""


def layer_gradients(
    classifier: Classifier, batch: Batch, clock: Stopwatch
) -> tuple[Sequence[Floats], Sequence[Floats]]:
    """Each layer's features and gradients [P, C, h, w]."""
    with clock.stage("gradient"):
        activations = batch.activations.take(batch.owner)
        return activations.features, classifier.gradients(activations, batch.one_hot)


def upsampled_result(
    maps: Floats, relu: bool, batch: Batch, layer: str, clock: Stopwatch
) -> MethodResult:
    """Maps [P, h, w] of a layer as a result at the input's size."""
    if not np.isfinite(maps).all():
        raise not_finite(layer)
    with clock.stage("combine"):
        raw = cpu.upsample(np.maximum(maps, 0) if relu else maps, batch.size)
        return MethodResult.of_maps(raw)

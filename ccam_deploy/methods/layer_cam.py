"""Layer-CAM (Jiang et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Classifier
from ccam_deploy.errors import OptionError
from ccam_deploy.methods.base import Batch, Method, MethodResult, places_of
from ccam_deploy.methods.channel_weights import layer_gradients, upsampled_result
from ccam_deploy.methods.stopwatch import Stopwatch


@dataclass(frozen=True)
class LayerCAM(Method):
    """Weighs each place of each channel by its positive gradient (Jiang et al. 2021, eq. 6-9).

    Attributes:
        layers: The target layers, whose maps are fused by their maximum; empty for the final one.
        relu: Cut negative values off; required where there are several layers.
        scaling: Which maps pass through the tanh that lifts small values, where there are several
            layers: all but the deepest as published ("shallow"), "all" as in TorchCAM, or "none".
        gamma: How strongly the tanh lifts them.
    """

    name = "layer-cam"
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

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain every pair of a batch; see Method."""
        places = places_of(self.layers or batch.layers[-1:], batch.layers)
        features, gradients = layer_gradients(classifier, batch, clock)
        results = []
        for place in places:
            with clock.stage("combine"), np.errstate(over="ignore", invalid="ignore"):
                slopes = np.maximum(gradients[place], 0)
                maps = np.einsum("pcij,pcij->pij", slopes, features[place])
            if len(places) > 1:
                maps = self._scale(maps, place == places[-1])
            results.append(upsampled_result(maps, self.relu, batch, batch.layers[place], clock))
        if len(results) == 1:
            return results[0]
        with clock.stage("combine"):
            raw = np.maximum.reduce([result.raw_saliency for result in results])
            return MethodResult.of_maps(raw)

    def _scale(self, maps: Floats, deepest: bool) -> Floats:
        """Bring a layer's maps [P, h, w] to the range that all layers share (eq. 9)."""
        maps = np.maximum(maps, 0)
        highest = maps.max(axis=(1, 2), keepdims=True)
        maps = np.divide(maps, highest, where=highest > 0, out=np.zeros_like(maps))
        if self.scaling == "all" or (self.scaling == "shallow" and not deepest):
            maps = np.tanh(np.float32(self.gamma) * maps)
        return maps

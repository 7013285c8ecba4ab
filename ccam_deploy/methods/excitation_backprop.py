"""Excitation backpropagation (Zhang et al. 2018): the units that a class owes its score to.

It needs the excitation graph of a bundle exported with --gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ccam_deploy.engines import Classifier
from ccam_deploy.kernels import cpu
from ccam_deploy.methods.base import Batch, Method, not_finite
from ccam_deploy.methods.results import MethodResult
from ccam_deploy.methods.stopwatch import Stopwatch


@dataclass(frozen=True)
class ExcitationBackprop(Method):
    """Passes a class's winning probability down to a layer (Zhang et al. 2018, eq. 1-3).

    Each unit shares its probability among the units that excite it. Before it is enlarged, a map
    holds the winning probability of each place, summed over channels. It adds up to 1, less what
    is lost at units that are positive by their bias alone.

    Attributes:
        layer: The target layer; empty for the last but one, which TorchRay's benchmark uses
            (layer3 of a ResNet, the layer before pool4 of a VGG).
        contrastive: Subtract the map of a class with the opposite weights, and cut negative
            values off (contrastive marginal winning probability, c-MWP).
    """

    name = "excitation-backprop"
    layer: str = ""
    contrastive: bool = False

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain every pair of a batch; see Method."""
        default_layer = batch.layers[max(len(batch.layers) - 2, 0)]
        place = batch.place_of(self.layer or default_layer)
        winners = batch.one_hot
        duals = -winners if self.contrastive else np.zeros_like(winners)
        with clock.stage("gradient"):
            maps = classifier.excitation(batch.images[batch.owner], winners, duals)[place]
        if not np.isfinite(maps).all():
            raise not_finite(batch.layers[place])
        with clock.stage("combine"):
            if self.contrastive:
                maps = np.maximum(maps, 0)
            return MethodResult.of_maps(cpu.upsample(maps, batch.size))

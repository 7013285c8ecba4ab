"""CAM (Zhou et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Classifier
from ccam_deploy.errors import OptionError
from ccam_deploy.methods.base import Batch
from ccam_deploy.methods.channel_weights import ChannelWeights, layer_gradients
from ccam_deploy.methods.stopwatch import Stopwatch

_SAME = 1e-2
"""The difference, relative to the largest gradient, up to which gradients count as equal. Half
precision rounds; a head that is not linear changes them by much more."""


@dataclass(frozen=True)
class CAM(ChannelWeights):
    """Weighs each channel by its weight in the classifier's last layer (Zhou et al. 2016, eq. 2).

    The weights are read off the gradient. Where the logits are linear in the pooled feature maps,
    the gradient of a channel is its weight, shared evenly among the places; networks whose
    gradients show otherwise are refused.

    Attributes:
        layer: The target layer; empty for the final one. The network must be linear after it.
        relu: Cut negative values off, which the paper does not.
    """

    name = "cam"
    relu: bool = False

    def _weights(self, features: Floats, gradients: Floats) -> Floats:
        totals: Floats = gradients.sum(axis=(2, 3), dtype=np.float64).astype(np.float32)
        return totals

    def _require_suitable(
        self, classifier: Classifier, batch: Batch, place: int, gradients: Floats, clock: Stopwatch
    ) -> None:
        """Refuse gradients that vary among places, or between the image and one of zeros."""
        classes = np.unique(batch.targets)
        with clock.stage("gradient"):
            zeros = np.zeros((1, *batch.images.shape[1:]), np.float32)
            zeros_batch = replace(
                batch,
                activations=classifier.backbone(zeros),
                owner=np.zeros(len(classes), np.int64),
                targets=classes,
            )
            _, zeros_gradients = layer_gradients(classifier, zeros_batch, clock)
        expected = zeros_gradients[place][np.searchsorted(classes, batch.targets), :, :1, :1]
        largest = np.abs(gradients).max(axis=(1, 2, 3), keepdims=True)
        if (np.abs(gradients - expected) > _SAME * largest).any():
            raise OptionError(
                f'cam needs logits that are linear in the mean of "{batch.layers[place]}", and '
                "the gradient shows that this network's are not; grad-cam works for any network"
            )

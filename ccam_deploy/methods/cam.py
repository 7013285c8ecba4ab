"""CAM (Zhou et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Classifier
from ccam_deploy.errors import OptionError
from ccam_deploy.methods.base import Batch, Stopwatch
from ccam_deploy.methods.channel_weights import ChannelWeights, layer_gradients

_SAME = 1e-2
"""How far gradients may differ, relative to the largest, and still count as equal: half precision
rounds, while a head that is not linear changes them by much more."""


@dataclass(frozen=True)
class CAM(ChannelWeights):
    """Weighs each channel by its weight in the classifier's last layer (Zhou et al. 2016, eq. 2).

    The weights are read off the gradient: where the logits are linear in the pooled feature maps,
    each channel's gradient is its weight, shared evenly among the places. That is checked.

    Attributes:
        layer: The target layer; empty for the final one. The network must be linear after it.
        relu: Cut negative values off, which the paper does not.

    """

    name = "cam"
    relu: bool = False

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
            _, slopes = layer_gradients(classifier, other, clock)
        expected = slopes[place][np.searchsorted(classes, batch.targets), :, :1, :1]
        largest = np.abs(gradients).max(axis=(1, 2, 3), keepdims=True)
        if (np.abs(gradients - expected) > _SAME * largest).any():
            raise OptionError(
                f'cam needs logits that are linear in the mean of "{batch.layers[place]}", and '
                "the gradient shows that this network's are not; grad-cam works for any network"
            )

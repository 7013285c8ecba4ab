"""What the methods are compared with: other libraries, run on the PyTorch network itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ccam_deploy as ccam
from ccam_deploy.arrays import Floats
from ccam_deploy.methods import Method


@dataclass(frozen=True)
class Case:
    """A bundle's explainer, its network, some of its inputs [B, C, H, W], a class for each."""

    explainer: ccam.Explainer
    model: nn.Module
    images: Floats
    classes: tuple[int, ...]

    @property
    def layers(self) -> list[str]:
        """The target layers' names."""
        return [layer.name for layer in self.explainer.bundle.manifest.layers]

    def explain(self, method: str | Method) -> ccam.Explanation:
        """Our explanation of all images."""
        return self.explainer.explain(self.images, list(self.classes), method=method)

    def torchcam(
        self, extractor: Callable[..., Any], layers: Sequence[str], **settings: Any
    ) -> list[Tensor]:
        """TorchCAM's maps [B, h, w], one per layer, not normalised.

        Nor does it upsample them.
        """
        size = self.images.shape[1:]
        with extractor(self.model, list(layers), input_shape=size, **settings) as peer:
            scores = self.model(torch.from_numpy(self.images.copy()).requires_grad_())
            maps = peer(list(self.classes), scores, normalized=False)
        return [one.detach() for one in maps]


def enlarged(maps: Tensor, size: Sequence[int]) -> Floats:
    """Maps [B, h, w] at another size, by PyTorch's own bilinear interpolation."""
    wide = nn.functional.interpolate(maps[:, None], tuple(size), mode="bilinear")[:, 0]
    return np.asarray(wide.detach(), np.float32)


def assert_correlated(actual: Floats, expected: Floats, least: float = 0.999) -> None:
    """Pearson correlation of each map with its peer; neither may be flat."""
    for saliency, peer in zip(actual, expected, strict=True):
        assert saliency.std() > 0
        assert peer.std() > 0
        assert np.corrcoef(saliency.ravel(), peer.ravel())[0, 1] >= least


def assert_same(actual: Floats, expected: Floats, off: float = 0.02) -> None:
    """Correlated, and off by at most a share as a whole: a correlation does not see the scale.

    Where a ReLU's input is all but zero, engines round it to either side; that is the 2 %.
    """
    assert_correlated(actual, expected)
    for saliency, peer in zip(actual, expected, strict=True):
        assert np.linalg.norm(saliency - peer) <= off * np.linalg.norm(peer)

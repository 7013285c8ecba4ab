"""The score of a class and its gradient, against PyTorch's in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ccam_deploy as ccam
from ccam_deploy.arrays import Floats
from ccam_deploy.methods.scores import score_gradient, score_of
from tests.helpers import example_pictures

MARGINS = (0.0, 2.0, 15.0, 20.0, 40.0, 80.0)
"""By how much a class is ahead of nine others; beyond 17, 1 less its probability is 0."""


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("sign", [1, -1])
def test_gradient_of_a_probability_keeps_its_digits(activation: Any, sign: int) -> None:
    """Of classes that a network is sure of, and of those that it rules out."""
    logits = np.random.default_rng(0).standard_normal((len(MARGINS), 10)).astype(np.float32)
    targets = np.arange(len(MARGINS))
    logits[targets, targets] += sign * np.array(MARGINS, np.float32)
    exact = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    own = torch.from_numpy(np.eye(10)[targets])
    if activation == "sigmoid":
        scores = (exact.sigmoid() * own).sum(dim=1)
        slopes = own * exact.sigmoid() * (-exact).sigmoid()
    else:
        scores = (exact.softmax(dim=1) * own).sum(dim=1)
        others = exact.softmax(dim=1) * (1 - own)
        slopes = scores[:, None] * (own * others.sum(dim=1, keepdim=True) - others)
    got = score_gradient("probability", logits, targets, activation)
    np.testing.assert_allclose(got, slopes.detach(), rtol=1e-5, atol=0)
    np.testing.assert_allclose(
        score_of("probability", logits, targets, activation), scores.detach(), rtol=1e-5
    )
    (gradient,) = torch.autograd.grad(scores.sum(), exact)
    few = np.array(MARGINS) < 20  # float64 has digits enough for the difference
    np.testing.assert_allclose(got[few], gradient[few], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("slope", [1.0, 1e-4, 1e-9, 1e-30])
def test_half_precision_passes_back_gradients_of_any_size(
    digits_bundle: Path, slope: float
) -> None:
    """As those of a probability are, of a class that the network is sure of."""
    pictures = example_pictures()[:2]
    with ccam.load(digits_bundle, precision="fp16") as explainer:
        images, _ = explainer.preprocess(pictures)
        activations = explainer.networks.backbone(images)
        rows = np.eye(10, dtype=np.float32)[activations.logits.argmax(axis=1)]
        rows[:, 3] = -0.5
        expected = explainer.networks.gradients(activations, rows)

        def relative(factor: Floats) -> tuple[Floats, ...]:
            got = explainer.networks.gradients(activations, rows * factor)
            return tuple(g / factor[:, :, None, None] for g in got)

        found = relative(np.array([[slope], [1]], np.float32))
    for one, two in zip(found, expected, strict=True):
        assert np.abs(two).max() > 0
        np.testing.assert_allclose(one, two, atol=2e-3 * float(np.abs(two).max()))

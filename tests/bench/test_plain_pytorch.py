"""The peer of the benchmark gives the paper's maps too, so that like is compared with like."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ccam_deploy as ccam
from bench.peers.plain_pytorch import PlainCollectionCAM
from tests.helpers import DIGITS_LAYERS, digits_model, example_pictures


@pytest.mark.parametrize("index", [0, 3, 6])
def test_peer_agrees_with_the_explainer(digits: ccam.Explainer, index: int) -> None:
    images, _ = digits.preprocess([example_pictures()[index]])
    result = digits.explain(images)
    plain = PlainCollectionCAM(digits_model(), DIGITS_LAYERS)
    saliency, count = plain.explain(torch.from_numpy(images[0].copy()))
    different = np.abs(saliency.numpy() - result.raw_saliency[0]) > 1e-4
    assert np.count_nonzero(different) <= 9  # pixels whose mask value lies on the quantile
    assert count == np.count_nonzero(result.weights[0])

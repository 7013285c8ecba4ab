"""Recipro-CAM against its definition, the head replayed in PyTorch one place at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ccam_deploy as ccam
from ccam_deploy.errors import OptionError
from ccam_deploy.methods import ReciproCAM
from tests.helpers import noise
from tests.methods.peers import Case, assert_correlated, assert_same, enlarged
from tests.networks import tiny


@pytest.mark.parametrize("score", ["probability", "logit"])
@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_is_its_definition(headed_bundle: Path, score: Any, batch_size: int) -> None:
    model, images = tiny(), noise(2, 3, 32, 48)
    kept: list[torch.Tensor] = []
    model.relu2.register_forward_hook(lambda m, i, o: kept.append(o.detach()))
    model(torch.from_numpy(images))
    with ccam.load(headed_bundle, batch_size=batch_size) as explainer:
        options = ReciproCAM(score=score)
        result = explainer.explain(images, [[1, 4], 2], method=options)
    for pair, (image, target) in enumerate([(0, 1), (0, 4), (1, 2)]):
        features = kept[0][image]
        expected = torch.zeros(8, 12)
        for row in range(8):
            for column in range(12):
                alone = torch.zeros_like(features)
                alone[:, row, column] = features[:, row, column]
                with torch.no_grad():
                    logits = model.head(alone.mean((1, 2)))
                expected[row, column] = (logits.softmax(0) if score == "probability" else logits)[
                    target
                ]
        wide = enlarged(expected[None], (32, 48))
        np.testing.assert_allclose(result.raw_saliency[pair][None], wide, atol=1e-5)


@pytest.mark.nightly
def test_is_its_definition_on_resnet18(resnet18_case: Case) -> None:
    """The whole network runs, and a hook leaves one place of the last layer's output."""
    case = resnet18_case
    layer = dict(case.model.named_modules())[case.layers[-1]]
    places = torch.eye(49).reshape(49, 1, 7, 7)
    result = case.explain("recipro-cam")
    for pair, target in enumerate(case.classes):
        handle = layer.register_forward_hook(lambda m, i, features: features * places)
        with torch.no_grad():
            logits = case.model(torch.from_numpy(case.images[pair : pair + 1]))
        handle.remove()
        expected = logits.softmax(1)[:, target].reshape(1, 7, 7)
        wide = enlarged(expected, case.images.shape[2:])
        assert_same(result.raw_saliency[pair][None], wide)


def test_logits_of_a_linear_head_give_cam(headed_bundle: Path) -> None:
    """Pooling and one linear layer: each place adds its own share, and the bias to all."""
    images = noise(2, 3, 32, 48)
    with ccam.load(headed_bundle) as explainer:
        got = explainer.explain(images, [1, 3], method=ReciproCAM(score="logit"))
        expected = explainer.explain(images, [1, 3], method="cam")
    assert_correlated(got.raw_saliency, expected.raw_saliency)


@pytest.mark.nightly
def test_logits_of_a_linear_head_give_cam_on_resnet18(resnet18_case: Case) -> None:
    result = resnet18_case.explain(ReciproCAM(score="logit"))
    assert_correlated(result.raw_saliency, resnet18_case.explain("cam").raw_saliency)


def test_bundle_without_a_head_says_what_to_export(tiny_bundle: Path) -> None:
    with (
        ccam.load(tiny_bundle) as explainer,
        pytest.raises(OptionError, match="no head graph; export it with --head"),
    ):
        explainer.explain(noise(1, 3, 32, 48), method="recipro-cam")


def test_unknown_score() -> None:
    with pytest.raises(OptionError, match='score is "loss"; it must be logit or probability'):
        ReciproCAM(score="loss")  # type: ignore[arg-type]

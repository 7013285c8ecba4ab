"""Excitation backpropagation on a bundle: which layer, which map, for which pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import ccam_deploy as ccam
from ccam_deploy.errors import BackendError, OptionError
from ccam_deploy.methods import ExcitationBackprop
from tests.excitation import chain_of_digits, winning
from tests.helpers import DIGITS_LAYERS, example_pictures, noise
from tests.methods.peers import Case, assert_correlated, enlarged
from tests.networks import digits_model

METHOD = "excitation-backprop"


@pytest.fixture
def case(differentiable: ccam.Explainer) -> Case:
    images, _ = differentiable.preprocess(example_pictures())
    classes = differentiable.networks.backbone(images).logits.argmax(axis=1)
    return Case(differentiable, digits_model(), images, tuple(map(int, classes)))


def by_definition(case: Case, layer: str, contrastive: bool) -> np.ndarray:
    """The maps of the chain of modules, enlarged."""
    chain, images = chain_of_digits(case.model), torch.from_numpy(case.images)
    winners, place = torch.eye(10)[list(case.classes)], 4 + 2 * DIGITS_LAYERS.index(layer)
    maps = winning(chain, images, winners)[place].sum(1)
    if contrastive:
        maps = (maps - winning(chain, images, winners, dual=True)[place].sum(1)).clamp(min=0)
    return enlarged(maps, images.shape[2:])


@pytest.mark.parametrize("contrastive", [False, True])
@pytest.mark.parametrize("layer", DIGITS_LAYERS)
def test_maps_by_definition(case: Case, layer: str, contrastive: bool) -> None:
    result = case.explain(ExcitationBackprop(layer, contrastive))
    assert_correlated(result.raw_saliency, by_definition(case, layer, contrastive), 0.9999)
    assert result.raw_saliency.min() >= 0
    assert result.saliency.max() == 1


def test_the_layer_is_the_last_but_one(case: Case, tiny_bundle: Path) -> None:
    usual = case.explain(METHOD).raw_saliency
    named = case.explain(ExcitationBackprop("layer3")).raw_saliency
    np.testing.assert_array_equal(usual, named)
    with pytest.raises(OptionError, match='layer "layer9" is not in the bundle; it has layer1'):
        case.explain(ExcitationBackprop("layer9"))


@pytest.mark.slow
def test_chunks_and_classes_do_not_matter(headed_bundle: Path) -> None:
    images, contrastive = noise(2, 3, 32, 48), ExcitationBackprop(contrastive=True)
    for method in (ExcitationBackprop(), contrastive):
        maps = []
        for size in (1, 2, 7):
            with ccam.load(headed_bundle, batch_size=size) as explainer:
                result = explainer.explain(images, [[1, 2], 3], method=method)
            maps.append(result.raw_saliency)
        np.testing.assert_allclose(maps[0], maps[1], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(maps[0], maps[2], rtol=1e-4, atol=1e-7)
        assert not np.allclose(maps[0][0], maps[0][1])


def test_half_precision_has_the_same_maps(case: Case, gradients_bundle: Path) -> None:
    with ccam.load(gradients_bundle, precision="fp16") as explainer:
        half = explainer.explain(case.images, list(case.classes), method=METHOD)
    np.testing.assert_array_equal(half.raw_saliency, case.explain(METHOD).raw_saliency)


def test_a_bundle_without_the_graph(tiny_bundle: Path) -> None:
    with (
        ccam.load(tiny_bundle) as explainer,
        pytest.raises(OptionError, match="no excitation graph; export it with --gradients"),
    ):
        explainer.explain(noise(1, 3, 32, 48), 1, method=METHOD)


def test_what_is_not_finite_is_refused(
    headed_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ccam.load(headed_bundle) as explainer:
        broken = (np.full((1, 8, 12), np.nan, np.float32),) * 2
        monkeypatch.setattr(explainer.networks, "excitation", lambda *given: broken)
        with pytest.raises(BackendError, match="has NaN or infinite features or gradients"):
            explainer.explain(noise(1, 3, 32, 48), 1, method=METHOD)

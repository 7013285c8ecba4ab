"""Collection-CAM on a bundle against the paper's algorithm written plainly in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ccam_deploy as ccam
from ccam_deploy.engines import Activations
from ccam_deploy.errors import BackendError, OptionError
from ccam_deploy.methods import CollectionCAM, LayerCAM
from tests.helpers import DIGITS_LAYERS, example_pictures
from tests.networks import digits_model, tiny
from tests.reference import collection_cam_in_pytorch


def groups(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == value).tolist()) for value in np.unique(labels)}


@pytest.mark.parametrize(
    "options",
    [
        CollectionCAM(),
        pytest.param(CollectionCAM(theta=0.5, k_max=4), marks=pytest.mark.slow),
        pytest.param(CollectionCAM(score="probability"), marks=pytest.mark.slow),
    ],
    ids=["defaults", "theta-and-k", "probability"],
)
def test_whole_pipeline_matches_pytorch(digits: ccam.Explainer, options: CollectionCAM) -> None:
    model = digits_model()
    pictures = example_pictures()
    result = digits.explain(pictures, method=options)
    images, _ = digits.preprocess(pictures)
    for index, target in enumerate(result.targets):
        expected, partitions = collection_cam_in_pytorch(
            model,
            torch.from_numpy(images[index]),
            int(target),
            DIGITS_LAYERS,
            options.theta,
            options.k_max,
            options.score == "probability",
        )
        for layer, partition in zip(result.layers, partitions, strict=True):
            assert groups(layer.labels[index]) == {frozenset(members) for members in partition}
        undecided = 40 if options.score == "probability" else 9
        assert_equal_maps(result.raw_saliency[index], expected.numpy(), undecided)


def assert_equal_maps(actual: np.ndarray, expected: np.ndarray, undecided: int) -> None:
    """Equal to 1e-4, but for a few of the 9,216 pixels (a thousandth) that the last bit decides.

    Two comparisons are strict: a mask's value with the quantile, which may lie on a plateau of the
    mask, and a gradient with zero. The gradient of a probability near 1 is a difference of nearly
    equal terms, so that now and then one of its signs is noise; one place of a small feature map
    covers many pixels.
    """
    difference = np.abs(actual - expected)
    assert np.count_nonzero(difference > 1e-4) <= undecided
    assert difference.max() < 1e-2


def test_non_square_input_matches_pytorch(tiny_bundle: Path) -> None:
    images = np.random.default_rng(1).standard_normal((3, 3, 32, 48)).astype(np.float32)
    model = tiny()
    with ccam.load(tiny_bundle) as explainer:
        result = explainer.explain(images, [0, 3, 2])
        names = [layer.name for layer in explainer.bundle.manifest.layers]
    for index, target in enumerate(result.targets):
        expected, _ = collection_cam_in_pytorch(
            model, torch.from_numpy(images[index]), int(target), names
        )
        np.testing.assert_allclose(result.raw_saliency[index], expected.numpy(), atol=1e-4)


def test_result_follows_from_masks_and_weights(digits: ccam.Explainer) -> None:
    """Saliency is the weighted sum of the masks, weights the softmax of the gain (eq. 24, 25)."""
    result = digits.explain(example_pictures()[:3])
    for pair in range(3):
        masks, weights, mic = result.masks[pair], result.weights[pair], result.mic[pair]
        assert masks.shape == (len(weights), 96, 96)
        assert len(weights) == sum(layer.count[pair] for layer in result.layers)
        combined = np.maximum(np.einsum("n,nij->ij", weights, masks), 0)
        np.testing.assert_allclose(result.raw_saliency[pair], combined, atol=1e-5)
        counted = masks.any(axis=(1, 2))
        assert not weights[~counted].any()
        alpha = np.exp(mic[counted].astype(np.float64))
        np.testing.assert_allclose(weights[counted], alpha / alpha.sum(), rtol=1e-4)


def test_gain_is_over_the_baseline(digits: ccam.Explainer) -> None:
    picture = example_pictures()[0]
    result = digits.explain(picture)
    images, _ = digits.preprocess([picture])
    model, target = digits_model(), int(result.targets[0])
    with torch.no_grad():
        masked = model(torch.from_numpy(images * result.masks[0][:, None]))[:, target]
        base = model(torch.zeros(1, 3, 96, 96))[0, target]
    np.testing.assert_allclose(result.mic[0], (masked - base).numpy(), atol=1e-4)


def test_layers_can_be_chosen(digits: ccam.Explainer) -> None:
    result = digits.explain(
        example_pictures()[:1], method=CollectionCAM(layers=("layer3", "layer1"))
    )
    assert [layer.name for layer in result.layers] == ["layer1", "layer3"]
    model = digits_model()
    images, _ = digits.preprocess(example_pictures()[:1])
    expected, _ = collection_cam_in_pytorch(
        model, torch.from_numpy(images[0]), int(result.targets[0]), ["layer1", "layer3"]
    )
    np.testing.assert_allclose(result.raw_saliency[0], expected.numpy(), atol=1e-4)


@pytest.mark.slow
def test_standardising_changes_the_partition(digits: ccam.Explainer) -> None:
    pictures = example_pictures()
    plain = digits.explain(pictures)
    scaled = digits.explain(pictures, method=CollectionCAM(standardise=True))
    same = [
        np.array_equal(one.labels, other.labels)
        for one, other in zip(plain.layers, scaled.layers, strict=True)
    ]
    assert not all(same)
    assert scaled.settings["options"]["standardise"] is True


def test_number_of_collections_stays_in_its_range(digits: ccam.Explainer) -> None:
    options = CollectionCAM(k_min=3, k_max=5)
    result = digits.explain(example_pictures(), method=options)
    for layer in result.layers:
        assert ((layer.count >= 3) & (layer.count <= 5)).all()
        assert layer.quality.shape == (8, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"theta": 1.0}, "theta is 1.0"),
        ({"theta": -0.1}, "theta is -0.1"),
        ({"gate": -0.1}, "gate is -0.1; it must be in"),
        ({"gate": 1.5}, "gate is 1.5"),
        ({"k_min": 5, "k_max": 4}, "k_min is 5 and k_max 4"),
        ({"k_min": 0}, "k_min is 0"),
        ({"score": "loss"}, 'score is "loss"'),
    ],
)
def test_options_out_of_range(changes: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CollectionCAM(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [CollectionCAM, LayerCAM])
@pytest.mark.parametrize("layers", [["layer4"], "layer4"])
def test_layers_may_be_any_sequence_of_names_or_one(method: Any, layers: Any) -> None:
    """They are kept as a tuple, by which costs and what is prepared on a GPU are found."""
    assert method(layers=layers) == method(layers=("layer4",))
    assert hash(method(layers=layers)) == hash(method(layers=("layer4",)))


def test_unknown_layer_is_named(digits: ccam.Explainer) -> None:
    options = CollectionCAM(layers=("layer9",))
    with pytest.raises(OptionError, match='"layer9" is not in the bundle; it has layer1'):
        digits.explain(example_pictures()[:1], method=options)


def test_features_that_overflowed_are_refused(
    digits: ccam.Explainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(activations: Activations, output_gradient: np.ndarray) -> list[np.ndarray]:
        gradients = [np.zeros_like(features) for features in activations.features]
        gradients[1][0, 3, 2, 2] = np.inf
        return gradients

    monkeypatch.setattr(digits.networks, "gradients", overflow)
    with pytest.raises(BackendError, match=f'layer "{DIGITS_LAYERS[1]}" has NaN or infinite'):
        digits.explain(example_pictures())

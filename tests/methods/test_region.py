"""Score-CAM and RISE against TorchCAM, their definitions in PyTorch, and what memory allows."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torchcam.methods import ScoreCAM as TorchScoreCAM

import ccam_deploy as ccam
from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Activations
from ccam_deploy.errors import BackendError, OptionError
from ccam_deploy.methods import RISE, Batch, Method, ScoreCAM, Stopwatch
from ccam_deploy.methods.rise import random_masks
from tests.helpers import noise
from tests.methods.peers import Case, assert_correlated, assert_same, enlarged


def score_cams_in_pytorch(case: Case, image: int) -> dict[str, Floats]:
    """The maps of each weight by the equations, one forward for each channel."""
    module = dict(case.model.named_modules())[case.layers[-1]]
    kept: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda m, i, o: kept.append(o.detach()))
    pixels, target = torch.from_numpy(case.images[image : image + 1].copy()), case.classes[image]
    with torch.no_grad():
        case.model(pixels)
        handle.remove()
        totals = {name: torch.zeros(kept[0].shape[2:]) for name in ("increase", "probability")}
        base = case.model(torch.zeros_like(pixels))[0, target]
        for feature in kept[0][0]:
            wide = F.interpolate(feature[None, None], pixels.shape[2:], mode="bilinear")[0, 0]
            if wide.max() == wide.min():
                continue
            mask = (wide - wide.min()) / (wide.max() - wide.min())
            logits = case.model(pixels * mask)[0]
            totals["increase"] += feature * (logits[target] - base)
            totals["probability"] += feature * logits.softmax(0)[target]
    size = case.images.shape[2:]
    return {name: enlarged(total.relu()[None], size) for name, total in totals.items()}


@pytest.mark.slow
def test_score_cam_follows_its_equations(digits_case: Case) -> None:
    increase = digits_case.explain(ScoreCAM(weights="increase")).raw_saliency
    probability = digits_case.explain(ScoreCAM(weights="probability")).raw_saliency
    for image in (0, 3):
        expected = score_cams_in_pytorch(digits_case, image)
        for saliency, peer in (
            (increase, expected["increase"]),
            (probability, expected["probability"]),
        ):
            np.testing.assert_allclose(saliency[image][None], peer, atol=1e-3 * peer.max())
            assert_correlated(saliency[image][None], peer)


@pytest.mark.slow
def test_score_cam_with_softmax_is_torchcams(case: Case) -> None:
    """It takes the softmax of the logits, less a constant, over the channels.

    Equal weights would give the channels' mean, which is most of the map; what is left without it
    correlates only where the scores are right. (TorchCAM scales the masks before it enlarges them.)
    """
    case = dataclasses.replace(case, images=case.images[:1], classes=case.classes[:1])
    size = case.images.shape[2:]
    (peer,) = case.torchcam(TorchScoreCAM, case.layers[-1:])
    expected = enlarged(peer, size)
    got = case.explain(ScoreCAM(weights="softmax")).raw_saliency
    assert_same(got, expected)
    features = case.explainer.networks.backbone(case.images).features[-1]
    mean = enlarged(torch.from_numpy(features.mean(axis=1)), size)
    assert_correlated(got - mean, expected - mean, least=0.99)


@pytest.mark.slow
def test_score_cam_keeps_each_channels_weight(digits_case: Case) -> None:
    """The map follows from weights and features; the increase is over an input of zeros."""
    result = digits_case.explain("score-cam")
    networks = digits_case.explainer.networks
    features = networks.backbone(digits_case.images).features[-1]
    zeros = networks.backbone(np.zeros_like(digits_case.images[:1])).logits[0]
    for pair, target in enumerate(digits_case.classes):
        np.testing.assert_array_equal(result.weights[pair], result.mic[pair])
        total = np.tensordot(result.weights[pair], features[pair], 1)
        wide = enlarged(torch.from_numpy(np.maximum(total, 0))[None], digits_case.images.shape[2:])
        np.testing.assert_allclose(result.raw_saliency[pair], wide[0], atol=1e-4 * wide.max())
        channel = int(features[pair].std(axis=(1, 2)).argmax())
        feature = torch.from_numpy(features[pair, channel][None])
        mask = enlarged((feature - feature.min()) / (feature.max() - feature.min()), (96, 96))[0]
        mask = (mask - mask.min()) / np.ptp(mask)
        logits = networks.backbone(digits_case.images[pair : pair + 1] * mask).logits[0]
        gain = logits[target] - zeros[target]
        assert result.mic[pair][channel] == pytest.approx(gain, abs=1e-3)


@pytest.mark.slow
def test_channels_that_vary_most_are_used(digits_case: Case) -> None:
    whole = digits_case.explain(ScoreCAM(weights="probability"))
    few = digits_case.explain(ScoreCAM(weights="probability", channels=5))
    features = digits_case.explainer.networks.backbone(digits_case.images).features[-1]
    for pair, spread in enumerate(features.std(axis=(2, 3))):
        used = np.flatnonzero(few.weights[pair])
        np.testing.assert_array_equal(used, np.sort(np.argsort(-spread)[:5]))
        np.testing.assert_allclose(few.weights[pair][used], whole.weights[pair][used], rtol=1e-3)


def rise_by_definition(case: Case, masks: Floats, p: float, image: int) -> Floats:
    """As its authors compute it: scores of all masked images, a product, N and p divided out."""
    stack = torch.from_numpy(case.images[image][None] * masks[:, None])
    with torch.no_grad():
        scores = torch.cat([case.model(part).softmax(1) for part in torch.split(stack, 50)])
    product = scores.T @ torch.from_numpy(masks.reshape(len(masks), -1))
    maps = product.reshape(-1, *masks.shape[1:]) / len(masks) / p
    return np.asarray(maps[case.classes[image]])


@pytest.mark.slow
def test_rise_with_masks_given_is_its_authors(case: Case, tmp_path: Path) -> None:
    size = case.images.shape[2:]
    masks = random_masks(np.random.default_rng(5), 60, 6, 0.3, (size[0], size[1]))
    np.save(tmp_path / "masks.npy", masks)
    result = case.explain(RISE(file=str(tmp_path / "masks.npy"), p=0.3))
    for image in range(2):
        expected = rise_by_definition(case, masks, 0.3, image)
        np.testing.assert_allclose(result.raw_saliency[image], expected, rtol=1e-3)
        assert_same(result.raw_saliency[image][None], expected[None])


@pytest.mark.slow
def test_rise_depends_on_its_seed_alone(digits_case: Case) -> None:
    bundle, networks = digits_case.explainer.bundle, digits_case.explainer.networks
    options = RISE(masks=50, seed=3)
    one = digits_case.explain(options)
    odd = ccam.Explainer(bundle, networks, "fp32", 7)
    other = odd.explain(digits_case.images, list(digits_case.classes), method=options)
    np.testing.assert_allclose(one.raw_saliency, other.raw_saliency, rtol=1e-4)
    again = digits_case.explain(RISE(masks=50, seed=4))
    assert np.abs(again.raw_saliency / one.raw_saliency - 1).max() > 0.05


def test_rise_score_can_be_the_logit(digits_case: Case) -> None:
    """Of masks that keep everything, p = 1, the mean is the score of the image itself."""
    for score, expected in (
        ("logit", lambda r: r.logits[range(8), r.targets]),
        ("probability", lambda r: [r.probability(pair) for pair in range(8)]),
    ):
        result = digits_case.explain(RISE(masks=3, p=1.0, score=score))  # type: ignore[arg-type]
        for raw, value in zip(result.raw_saliency, expected(result), strict=True):
            np.testing.assert_allclose(raw, value, rtol=1e-4)


@pytest.mark.parametrize(("size", "cells"), [((32, 48), 8), ((33, 47), 5), ((9, 9), 9)])
def test_random_masks_are_shifted_upsampled_grids(size: tuple[int, int], cells: int) -> None:
    masks = random_masks(np.random.default_rng(2), 20, cells, 0.4, size)
    source = np.random.default_rng(2)
    cell = np.ceil(np.array(size) / cells).astype(int)
    for mask in masks:
        grid = torch.from_numpy(source.random((cells, cells)) < 0.4).float()
        top, left = source.integers(0, cell)
        wide = F.interpolate(grid[None, None], tuple((cells + 1) * cell), mode="bilinear")[0, 0]
        expected = wide[top : top + size[0], left : left + size[1]]
        np.testing.assert_allclose(mask, expected, atol=1e-6)


def test_random_masks_keep_their_share() -> None:
    masks = random_masks(np.random.default_rng(0), 2000, 8, 0.3, (40, 56))
    assert masks.dtype == np.float32
    assert (masks.min(), masks.max()) == (0, 1)
    np.testing.assert_allclose(masks.mean(axis=0), 0.3, atol=0.06)


class Bright:
    """A classifier of two classes whose logits are the masked image's mean and its negative."""

    def __init__(self, features: Floats) -> None:
        self.features = features
        self.images = 1 + np.abs(noise(len(features), 3, 24, 32))
        self.asked: list[int] = []

    def backbone(self, images: Floats) -> Activations:
        return Activations(self._logits(images), (self.features[: len(images)],), {})

    def gradients(self, activations: Activations, output_gradient: Floats) -> tuple[Floats, ...]:
        raise AssertionError("these methods take no gradient")

    def masked_logits(self, images: Floats, masks: Floats, owner: NDArray[np.int64]) -> Floats:
        self.asked.append(len(masks))
        return self._logits(images[owner] * masks[:, None])

    def batch(self, owner: list[int], targets: list[int], chunk: int = 4) -> Batch:
        pairs = np.array(owner), np.array(targets)
        zeros = np.zeros(2, np.float32)
        return Batch(self.images, self.backbone(self.images), *pairs, ("last",), zeros, chunk)

    def head_logits(self, features: Floats, rest: Floats | None = None) -> Floats:
        raise AssertionError("these methods need no head")

    def input_gradient(
        self, images: Floats, output_gradient: Floats, guided: bool = False
    ) -> Floats:
        raise AssertionError("these methods need no gradient of the image")

    def excitation(self, images: Floats, winners: Floats, duals: Floats) -> tuple[Floats, ...]:
        raise AssertionError("these methods need no winning probabilities")

    def _logits(self, images: Floats) -> Floats:
        mean = images.mean(axis=(1, 2, 3), dtype=np.float32)
        return np.stack([mean, -mean], axis=1)


def run(method: Method, classifier: Bright, batch: Batch) -> Any:
    return method.explain(classifier, batch, Stopwatch())


@pytest.mark.parametrize(("method", "each"), [(ScoreCAM(), 6), (RISE(masks=10, cells=4), 10)])
def test_classes_of_an_image_share_its_forwards(method: Method, each: int) -> None:
    classifier = Bright(noise(3, 6, 3, 4))
    whole = run(method, classifier, classifier.batch([0, 0, 2, 2], [1, 0, 0, 1]))
    assert sum(classifier.asked) == 2 * each
    assert max(classifier.asked) == 4
    for pair, (image, target) in enumerate([(0, 1), (0, 0), (2, 0), (2, 1)]):
        alone = run(method, classifier, classifier.batch([image], [target]))
        np.testing.assert_allclose(whole.raw_saliency[pair], alone.raw_saliency[0], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "channels", "masks"),
    [
        (ScoreCAM(), 2048, 2048),
        (RISE(masks=64), 2, 64),
        pytest.param(RISE(), 2, 4000, marks=pytest.mark.nightly),
    ],
)
def test_memory_does_not_grow_with_the_masks(method: Method, channels: int, masks: int) -> None:
    """64 masks of 224×224 are 13 MB, 4,000 are 803 MB; a chunk of four and its images 3 MB."""
    classifier = Bright(noise(1, channels, 7, 7))
    classifier.images = 1 + np.abs(noise(1, 3, 224, 224))
    batch = classifier.batch([0], [0])
    tracemalloc.start()
    try:
        result = run(method, classifier, batch)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.masks[0].shape == (0, 224, 224)
    assert sum(classifier.asked) == masks
    assert peak < 12e6


values = st.sampled_from([0.0, 1.0, -1.0, 2.5, 1e9]) | st.floats(-1e6, 1e6, width=32)


@settings(max_examples=40)
@given(features=arrays(np.float32, (2, 3, 2, 3), elements=values))
def test_any_features_give_finite_maps(features: Floats) -> None:
    """Constant channels have no mask and no weight; maps are finite, without a warning."""
    classifier = Bright(features)
    flat = np.ptp(features.reshape(2, 3, -1), axis=2) == 0
    for weights in ("increase", "probability", "softmax"):
        batch = classifier.batch([0, 1], [0, 1])
        result = run(ScoreCAM(weights=weights), classifier, batch)
        assert np.isfinite(result.raw_saliency).all()
        assert ((result.saliency >= 0) & (result.saliency <= 1)).all()
        for own, weight, gain in zip(flat, result.weights, result.mic, strict=True):
            assert not weight[own].any()
            assert not gain[own].any()


def test_features_that_are_not_finite_are_refused() -> None:
    features = noise(2, 3, 2, 3)
    features[1, 0, 0, 0] = np.nan
    classifier = Bright(features)
    assert run(ScoreCAM(), classifier, classifier.batch([0], [0])).mic
    with pytest.raises(BackendError, match='layer "last" has NaN or infinite features'):
        run(ScoreCAM(), classifier, classifier.batch([1], [0]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_collection_cam_refuses_scores_that_are_not_finite(
    digits: ccam.Explainer, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """One of many is enough: it would make every weight NaN."""
    classify = digits.networks.masked_logits

    def broken(*given: Any) -> Any:
        logits = classify(*given)
        logits[-1, 3] = value
        return logits

    monkeypatch.setattr(digits.networks, "masked_logits", broken)
    with pytest.raises(BackendError, match="NaN or infinite logits for these images under masks"):
        digits.explain(noise(1, 3, *digits.bundle.manifest.input[1:]), 3)


def test_scores_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = Bright(noise(1, 3, 2, 3))
    monkeypatch.setattr(
        classifier, "masked_logits", lambda i, m, o: np.full((len(m), 2), np.nan, np.float32)
    )
    for method in (ScoreCAM(), RISE(masks=4, cells=2)):
        with pytest.raises(BackendError, match="NaN or infinite logits for these images under"):
            run(method, classifier, classifier.batch([0], [0]))


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (ScoreCAM, {"weights": "cic"}, 'weights is "cic"; it must be increase, probability'),
        (ScoreCAM, {"channels": -1}, "channels is -1"),
        (RISE, {"masks": 0}, "masks is 0; it must be 1 to"),
        (RISE, {"cells": 0}, "cells is 0"),
        (RISE, {"p": 0.0}, "p is 0.0"),
        (RISE, {"p": 1.1}, "p is 1.1"),
        (RISE, {"seed": -1}, "seed is -1"),
        (RISE, {"score": "loss"}, 'score is "loss"'),
        (RISE, {"file": "a.npy", "seed": 1}, "leave them out with a file"),
    ],
)
def test_options_out_of_range(method: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        method(**changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ScoreCAM(layer="top"), 'layer "top" is not in the bundle; it has last'),
        (RISE(cells=25), "cells is 25; an input of 24x32 takes 24"),
        (
            RISE(file="none.npy"),
            "none.npy is not a .npy file that can be read: No such file or directory$",
        ),
        (
            RISE(file="text.npy"),
            "text.npy is not a .npy file that can be read; save the array with numpy.save$",
        ),
        (
            RISE(file="objects.npy"),
            "objects.npy is not a .npy file that can be read; save the array with numpy.save$",
        ),
        (RISE(file="several.npz"), "several.npz holds several arrays; it must hold one"),
        (RISE(file="wide.npy"), r"wide.npy holds float32\[2, 24, 24\]; the bundle takes"),
        (RISE(file="empty.npy"), r"empty.npy holds float32\[0, 24, 32\]"),
        (RISE(file="whole.npy"), r"whole.npy holds int64\[2, 24, 32\]"),
        (RISE(file="bright.npy"), r"bright.npy has masks outside of \[0, 1\]"),
        (RISE(file="nan.npy"), r"nan.npy has masks outside of \[0, 1\]"),
    ],
)
def test_what_cannot_be_used_is_refused(
    options: Method, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.npy").write_text("masks")
    np.save("objects.npy", np.array([{}], object), allow_pickle=True)
    np.savez("several.npz", np.zeros((2, 24, 32)))
    np.save("wide.npy", np.zeros((2, 24, 24), np.float32))
    np.save("empty.npy", np.zeros((0, 24, 32), np.float32))
    np.save("whole.npy", np.zeros((2, 24, 32), np.int64))
    np.save("bright.npy", np.full((2, 24, 32), 1.5, np.float32))
    np.save("nan.npy", np.full((2, 24, 32), np.nan, np.float32))
    classifier = Bright(noise(1, 3, 2, 3))
    with pytest.raises(OptionError, match=message):
        run(options, classifier, classifier.batch([0], [0]))

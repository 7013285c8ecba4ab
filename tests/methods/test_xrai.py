"""XRAI against its algorithm, written plainly over Captum's gradients and scikit-image's shapes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from captum import attr as captum
from numpy.typing import NDArray

import ccam_deploy as ccam
from ccam_deploy.arrays import Floats
from ccam_deploy.errors import BackendError
from ccam_deploy.methods import XRAI, IntegratedGradients
from ccam_deploy.methods.integrated_gradients import Baseline
from ccam_deploy.methods.xrai import rank
from tests.helpers import example_pictures, noise
from tests.methods.peers import Case, assert_same
from tests.networks import digits_model

pytest.importorskip("skimage", reason="scikit-image is not installed")

BASELINES: dict[Baseline, float] = {"black": 0.0, "white": 1.0}


@pytest.fixture
def digits_case(differentiable: ccam.Explainer) -> Case:
    images, _ = differentiable.preprocess(example_pictures()[:3])
    classes = differentiable.networks.backbone(images).logits.argmax(axis=1)
    return Case(differentiable, digits_model(), images, tuple(map(int, classes)))


def attributions_by_captum(case: Case, steps: int) -> Floats:
    """The mean [B, H, W] of integrated gradients from black and from white pixels."""
    how = case.explainer.bundle.manifest.preprocessing
    peer, found = captum.IntegratedGradients(case.model), []
    for level in BASELINES.values():
        start = (level - np.array(how.mean)) / np.array(how.std)
        values = peer.attribute(
            torch.from_numpy(case.images),
            torch.from_numpy(start.astype(np.float32))[None, :, None, None].expand(
                case.images.shape
            ),
            target=list(case.classes),
            n_steps=steps,
            method="riemann_middle",
        )
        found.append(values.sum(1).detach().numpy())
    mean: Floats = np.mean(found, axis=0)
    return mean


def regions_by_scikit_image(case: Case, image: int, dilation: int) -> list[NDArray[np.bool_]]:
    """Felzenszwalb's segments of the picture at the authors' six scales, each dilated by a disk."""
    from skimage import morphology, segmentation

    how = case.explainer.bundle.manifest.preprocessing
    pixels = np.moveaxis(case.images[image], 0, -1) * np.array(how.std) + np.array(how.mean)
    scaled = 2 * (pixels - pixels.min()) / np.ptp(pixels) - 1
    disk = morphology.disk(dilation)  # type: ignore[no-untyped-call]
    found = []
    for scale in (50, 100, 150, 250, 500, 1200):
        labels = segmentation.felzenszwalb(
            scaled.astype(np.float32), scale, sigma=0.8, min_size=150, channel_axis=-1
        )
        for label in range(labels.max() + 1):
            found.append(morphology.dilation(labels == label, disk))
    return found


def xrai_by_definition(
    values: Floats, regions: list[NDArray[np.bool_]], least: int
) -> NDArray[np.float64]:
    """Adds, as long as it can, the region whose new pixels have the highest mean."""
    covered = np.zeros(values.shape, bool)
    found = np.zeros(values.shape)
    while True:
        added = [region & ~covered for region in regions]
        means = [values[new].mean() if new.sum() >= least else -np.inf for new in added]
        best = int(np.argmax(means))
        if means[best] == -np.inf:
            break
        found[added[best]] = means[best]
        covered |= added[best]
    if not covered.all():
        found[~covered] = values[~covered].mean()
    return found


@pytest.mark.slow
def test_xrai_follows_its_algorithm(case: Case) -> None:
    """Regions are taken by our own gradients: Captum's, rounded otherwise, may swap two of them."""
    options = [IntegratedGradients(8, "midpoint", colour, "sum") for colour in BASELINES]
    both = [case.explain(one).raw_saliency for one in options]
    attributions = np.mean(both, axis=0)
    assert_same(attributions, attributions_by_captum(case, 8))
    got = case.explain(XRAI(steps=8)).raw_saliency
    for image, one in enumerate(got):
        regions = regions_by_scikit_image(case, image, dilation=5)
        assert len(regions) > 10
        expected = xrai_by_definition(attributions[image], regions, least=50)
        assert_same(one[None], expected[None].astype(np.float32))
        assert 3 < len(np.unique(one)) < len(regions)


def test_xrai_adds_regions_by_the_mean_of_what_they_add() -> None:
    """By hand: the right half has mean 3, then of the left region's six pixels four are new."""
    values = np.array([[0, 1, 2, 4], [0, 1, 2, 4]], np.float32)
    right, left, speck = np.zeros((3, 2, 4), bool)
    right[:, 2:] = True
    left[:, :3] = True
    speck[0, 0] = True
    got = rank(values, np.stack([left, right, speck]), least=2)
    np.testing.assert_array_equal(got, np.array([[0.5, 0.5, 3, 3]] * 2, np.float32))


def test_xrai_gives_the_rest_its_mean() -> None:
    values = np.array([[5, 1, 3]], np.float32)
    region = np.array([[[True, False, False]]])
    np.testing.assert_array_equal(rank(values, region, least=1), [[5, 2, 2]])


def test_xrai_without_scikit_image(headed_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    with (
        ccam.load(headed_bundle) as explainer,
        pytest.raises(BackendError, match=r"xrai needs scikit-image .*ccam-deploy\[xrai\]"),
    ):
        explainer.explain(noise(1, 3, 32, 48), 1, method="xrai")

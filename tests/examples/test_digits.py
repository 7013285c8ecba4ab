"""The example classifier keeps what is said of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

import ccam_deploy as ccam
from ccam_deploy.arrays import Floats
from ccam_deploy.examples.scenes import Scene, make_scenes
from tests.helpers import RECIPES

pytest.importorskip("sklearn")


@pytest.mark.slow
def test_accuracy_on_scenes_it_never_saw(digits: ccam.Explainer) -> None:
    scenes = make_scenes("test", 300, seed=50_000)
    images = prepared(scenes)
    logits = np.concatenate([digits.networks.backbone(part).logits for part in _parts(images)])
    truth = np.array([scene.digits[0] for scene in scenes])
    assert (logits.argmax(1) == truth).mean() > 0.9


@pytest.mark.slow
def test_maps_lie_on_the_digit(digits: ccam.Explainer) -> None:
    """The peak of the map is inside the digit's box far more often than its area would have it."""
    scenes = make_scenes("test", 40, seed=60_000)
    images = prepared(scenes)
    result = digits.explain(images, [scene.digits[0] for scene in scenes])
    hits, areas = [], []
    for saliency, scene in zip(result.saliency, scenes, strict=True):
        row, column = np.unravel_index(saliency.argmax(), saliency.shape)
        left, top, right, bottom = scene.boxes[0]
        hits.append(left <= column < right and top <= row < bottom)
        areas.append((right - left) * (bottom - top) / saliency.size)
    assert np.mean(hits) > 0.8 > 4 * np.mean(areas)


def test_weights_are_small() -> None:
    assert (RECIPES / "digits.pt").stat().st_size < 2_000_000


def prepared(scenes: Sequence[Scene]) -> Floats:
    """The scenes as the network's input, scaled by hand: [n, 3, 96, 96]."""
    pixels = np.stack([scene.image for scene in scenes]).astype(np.float32) / 255
    return np.asarray((pixels - 0.45) / 0.25, np.float32).transpose(0, 3, 1, 2).copy()


def _parts(images: Floats) -> list[Floats]:
    return [images[start : start + 50] for start in range(0, len(images), 50)]

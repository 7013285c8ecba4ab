"""A call's budget of time, on engines that take as long as a clock is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import ccam_deploy as ccam
from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.manifest import Manifest
from ccam_deploy.engines import Activations, Networks
from ccam_deploy.errors import OptionError
from ccam_deploy.inputs import Inputs
from ccam_deploy.methods import CollectionCAM, GradCAM
from ccam_deploy.targets import Top
from tests.clock import FakeClock
from tests.helpers import noise

PER_CALL, PER_IMAGE, PER_PAIR, PER_MASK = 3.0, 2.0, 0.5, 1.0
"""Milliseconds of an engine."""
CHANNELS = (6, 8)
REHEARSALS = 28


class Timed(Networks):
    """Real engines on a clock that goes on by what their work is said to take."""

    def __init__(self, explainer: ccam.Explainer) -> None:
        networks, precision = explainer.networks, explainer.bundle.precision(explainer.precision)
        super().__init__(networks.engines, precision.gradient_scale, networks.backend)
        self.clock = FakeClock()
        self.backbones: list[int] = []
        self.slower = 1.0

    def backbone(self, images: Floats) -> Activations:
        self.backbones.append(len(images))
        self._spend(PER_CALL + PER_IMAGE * len(images))
        return super().backbone(images)

    def gradients(self, activations: Activations, output_gradient: Floats) -> tuple[Floats, ...]:
        self._spend(PER_PAIR * len(output_gradient))
        return super().gradients(activations, output_gradient)

    def masked_logits(self, images: Floats, masks: Floats, owner: NDArray[np.int64]) -> Floats:
        self._spend(PER_MASK * len(masks))
        return super().masked_logits(images, masks, owner)

    def _spend(self, milliseconds: float) -> None:
        self.clock.time += self.slower * milliseconds / 1000


class Preparing(Inputs):
    """Prepares each picture in 4 ms."""

    def __init__(self, manifest: Manifest, batch_size: int, clock: FakeClock) -> None:
        super().__init__(manifest, batch_size, ahead=False)
        self.clock = clock

    def preprocess(self, images: Any) -> Any:
        if not isinstance(images, np.ndarray):
            self.clock.time += 0.004 * len(images)
        return super().preprocess(images)


@pytest.fixture(scope="module")
def plain(tiny_bundle: Path) -> Iterator[ccam.Explainer]:
    with ccam.load(tiny_bundle) as explainer:
        yield explainer


def timed(plain: ccam.Explainer, batch_size: int = 16) -> tuple[ccam.Explainer, Timed]:
    networks, bundle = Timed(plain), plain.bundle
    explainer = ccam.Explainer(bundle, networks, plain.precision, batch_size, now=networks.clock)
    explainer._inputs = Preparing(bundle.manifest, batch_size, networks.clock)
    return explainer, networks


def longest(images: int, pairs: int, k_max: int) -> float:
    """Milliseconds of a batch with as many masks as there can be."""
    masks = pairs * sum(min(k_max, channels) for channels in CHANNELS)
    return PER_CALL + PER_IMAGE * images + PER_PAIR * pairs + PER_MASK * masks


def largest(budget_ms: float, *parts: tuple[int, int]) -> int:
    """The largest k_max, of 2 to 10, that fits."""
    fitting = [k for k in range(2, 11) if sum(longest(*part, k) for part in parts) <= budget_ms]
    return max(fitting)


def test_the_largest_k_max_that_fits(plain: ccam.Explainer) -> None:
    """For any budget, and the result is to the bit that of asking for it."""
    explainer, networks = timed(plain)
    explainer.calibrate()
    images = noise(1, 3, 32, 48, seed=3)
    chosen = []
    for budget_ms in np.arange(longest(1, 1, 2) + 0.25, longest(1, 1, 10) + 3, 0.5):
        started = networks.clock()
        result = explainer.explain(images, 2, budget_ms=float(budget_ms))
        assert 1000 * (networks.clock() - started) <= budget_ms
        k_max = largest(budget_ms, (1, 1))
        chosen.append(k_max)
        options = CollectionCAM(k_max=k_max)
        assert result.settings["options"] == dataclasses.asdict(options)
        told = result.settings["budget"]
        assert told == {
            "ms": budget_ms,
            "predicted_ms": pytest.approx(longest(1, 1, k_max)),
            "k_max": k_max,
            "k_max_asked": 10,
        }
        expected = plain.explain(images, 2, method=options)
        np.testing.assert_array_equal(result.raw_saliency, expected.raw_saliency)
        np.testing.assert_array_equal(result.weights[0], expected.weights[0])
        assert result.layers[0].quality.shape == (1, k_max - 1)
    assert chosen == sorted(chosen)
    assert set(chosen) == {2, 3, 4, 5, 6, 7, 10}
    assert len(networks.backbones) == len(chosen) + REHEARSALS


def test_k_max_is_never_raised(plain: ccam.Explainer) -> None:
    explainer, _ = timed(plain)
    options = CollectionCAM(theta=0.3, k_min=3, k_max=4, layers=("relu2",))
    result = explainer.explain(noise(1, 3, 32, 48), method=options, budget_ms=1000)
    assert result.settings["options"] == dataclasses.asdict(options)
    assert result.settings["budget"]["k_max"] == result.settings["budget"]["k_max_asked"] == 4


def test_a_budget_is_the_whole_calls(plain: ccam.Explainer) -> None:
    """All batches and classes of the call share it, and all have the same k_max."""
    explainer, networks = timed(plain, batch_size=2)
    images = noise(5, 3, 32, 48)
    parts = [(2, 4), (2, 4), (1, 2)]
    budget_ms = sum(longest(*part, 4) for part in parts) + 0.5
    explainer.calibrate(5, 2)
    assert len(networks.backbones) == 2 * REHEARSALS
    started = networks.clock()
    result = explainer.explain(images, Top(2), budget_ms=budget_ms)
    assert 1000 * (networks.clock() - started) <= budget_ms
    assert result.settings["budget"]["k_max"] == largest(budget_ms, *parts) == 4
    assert len(result) == 10
    expected = plain.explain(images, Top(2), method=CollectionCAM(k_max=4))
    np.testing.assert_allclose(result.saliency, expected.saliency, atol=1e-5)


def test_preparing_counts(plain: ccam.Explainer) -> None:
    """Pictures take 4 ms each before the engines start."""
    explainer, _ = timed(plain)
    pictures = [Image.fromarray(np.full((40, 60, 3), level, np.uint8)) for level in (40, 200)]
    budget_ms = longest(2, 2, 5) + 0.5
    images, _ = plain.preprocess(pictures)
    from_array = explainer.explain(images, budget_ms=budget_ms)
    from_pictures = explainer.explain(pictures, budget_ms=budget_ms)
    assert from_array.settings["budget"]["k_max"] == 5
    assert from_pictures.settings["budget"]["k_max"] == largest(budget_ms - 8, (2, 2)) == 3


def refusing(explainer: ccam.Explainer, message: str, budget_ms: Any, **how: Any) -> None:
    with pytest.raises(OptionError, match=message):
        explainer.explain(noise(1, 3, 32, 48), budget_ms=budget_ms, **how)


def test_a_budget_that_cannot_be_kept_is_refused(plain: ccam.Explainer) -> None:
    explainer, networks = timed(plain)
    explainer.calibrate()
    done = len(networks.backbones)
    least = longest(1, 1, 2)
    message = rf"budget_ms is 2\.5; with k_max 2, the least, this call is .* take {least:.1f} ms"
    refusing(explainer, message, 2.5)
    refusing(explainer, "above 0 and finite", -1)
    refusing(explainer, "alone; the method is grad-cam", 5, method="grad-cam")
    options = GradCAM()
    refusing(explainer, "alone; the method is", 5, method=options)
    assert len(networks.backbones) == done


@pytest.mark.parametrize(("images", "classes"), [(1, 1), (3, 2), (6, 1)])
def test_what_was_calibrated_is_not_measured_again(
    plain: ccam.Explainer, images: int, classes: int
) -> None:
    explainer, networks = timed(plain)
    explainer.calibrate(images, classes)
    done = sum(networks.backbones)
    assert done >= images * REHEARSALS
    explainer.explain(noise(images, 3, 32, 48), Top(classes), budget_ms=1000)
    assert sum(networks.backbones) == done + images


def test_calibrating_again_is_for_a_machine_that_changed(plain: ccam.Explainer) -> None:
    """Engines that have become three times as slow are found out by that alone."""
    explainer, networks = timed(plain)
    explainer.calibrate()
    networks.slower = 3.0
    images, budget_ms = noise(1, 3, 32, 48), 3 * longest(1, 1, 5) + 1
    ks = []
    for _ in range(2):
        result = explainer.explain(images, budget_ms=budget_ms)
        ks.append(result.settings["budget"]["k_max"])
        explainer.calibrate()
    assert ks == [10, 5]


@pytest.mark.parametrize(
    ("images", "classes", "message"),
    [
        (0, 1, "images is 0; it must be at least 1"),
        (1, 0, "classes is 0; it must be 1 to 5"),
        (1, 6, "classes is 6; it must be 1 to 5"),
    ],
)
def test_what_cannot_be_calibrated(
    plain: ccam.Explainer, images: int, classes: int, message: str
) -> None:
    explainer, networks = timed(plain)
    with pytest.raises(OptionError, match=message):
        explainer.calibrate(images, classes)
    assert not networks.backbones


def test_threads_share_what_was_measured(plain: ccam.Explainer) -> None:
    explainer, networks = timed(plain)
    images = [noise(1, 3, 32, 48, seed=seed) for seed in range(8)]

    def explain(image: Floats) -> ccam.Explanation:
        return explainer.explain(image, budget_ms=1e6)

    with ThreadPoolExecutor(8) as pool:
        results: Sequence[ccam.Explanation] = list(pool.map(explain, images))
    assert len(networks.backbones) == REHEARSALS + 8
    for one, result in zip(images, results, strict=True):
        assert result.settings["budget"]["k_max"] == 10
        np.testing.assert_array_equal(result.raw_saliency, plain.explain(one).raw_saliency)


def test_without_a_budget_nothing_is_measured(plain: ccam.Explainer) -> None:
    explainer, networks = timed(plain)
    result = explainer.explain(noise(1, 3, 32, 48))
    assert networks.backbones == [1]
    assert "budget" not in result.settings

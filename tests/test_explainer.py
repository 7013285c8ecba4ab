"""The explainer: batches, targets, threads, memory and everything that it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import ccam_deploy as ccam
from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Activations, Networks
from ccam_deploy.errors import BackendError, BundleError, ImageError, OptionError, TargetError
from ccam_deploy.fidelity.similarity import spearman
from ccam_deploy.methods import GradCAM
from ccam_deploy.targets import Targets, Top
from tests.helpers import example_pictures, noise

STAGES = {
    "preprocess",
    "backbone",
    "gradient",
    "statistics",
    "partition",
    "masks",
    "classifier",
    "combine",
}


class Counting(Networks):
    """Real engines that note how much goes through them at a time."""

    def __init__(self, explainer: ccam.Explainer) -> None:
        networks, precision = explainer.networks, explainer.bundle.precision(explainer.precision)
        super().__init__(networks.engines, precision.gradient_scale, networks.backend)
        self.images: list[int] = []
        self.pairs: list[int] = []
        self.masks: list[int] = []

    def backbone(self, images: Floats) -> Activations:
        self.images.append(len(images))
        return super().backbone(images)

    def gradients(self, activations: Activations, output_gradient: Floats) -> tuple[Floats, ...]:
        self.pairs.append(len(output_gradient))
        return super().gradients(activations, output_gradient)

    def masked_logits(self, images: Floats, masks: Floats, owner: NDArray[np.int64]) -> Floats:
        self.masks.append(len(masks))
        return super().masked_logits(images, masks, owner)


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Path) -> Iterator[ccam.Explainer]:
    with ccam.load(tiny_bundle) as explainer:
        yield explainer


def with_batches(explainer: ccam.Explainer, size: int) -> ccam.Explainer:
    """The same engines, another batch size."""
    return ccam.Explainer(explainer.bundle, explainer.networks, explainer.precision, size)


def counting(explainer: ccam.Explainer, size: int) -> tuple[ccam.Explainer, Counting]:
    networks = Counting(explainer)
    return ccam.Explainer(explainer.bundle, networks, explainer.precision, size), networks


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batches_equal_single_images(digits: ccam.Explainer, batch_size: int) -> None:
    pictures = example_pictures()
    together = with_batches(digits, batch_size).explain(pictures)
    for index, picture in enumerate(pictures):
        alone = digits.explain(picture)
        assert together.targets[index] == alone.targets[0]
        np.testing.assert_allclose(together.saliency[index], alone.saliency[0], atol=1e-5)
        np.testing.assert_allclose(together.logits[index], alone.logits[0], atol=1e-4)
        np.testing.assert_allclose(together.weights[index], alone.weights[0], atol=1e-5)
        np.testing.assert_allclose(together.mic[index], alone.mic[0], atol=1e-4)
        for one, other in zip(together.layers, alone.layers, strict=True):
            np.testing.assert_array_equal(one.labels[index], other.labels[0])
    assert together.image_index.tolist() == list(range(8))
    assert len(together.geometries) == len(together) == 8


def test_best_class_is_explained_by_default(digits: ccam.Explainer) -> None:
    result = digits.explain(example_pictures())
    np.testing.assert_array_equal(result.targets, result.logits.argmax(axis=1))
    exponent = np.exp(result.logits.astype(np.float64))
    expected = exponent.max(axis=1) / exponent.sum(axis=1)
    assert [result.probability(pair) for pair in range(8)] == pytest.approx(expected, rel=1e-9)


def test_saliency_is_the_raw_map_in_the_unit_interval(tiny: ccam.Explainer) -> None:
    result = tiny.explain(noise(3, 3, 32, 48))
    low = result.raw_saliency.min(axis=(1, 2), keepdims=True)
    high = result.raw_saliency.max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(
        result.saliency, (result.raw_saliency - low) / (high - low), atol=1e-6
    )


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_several_classes_share_one_backbone_pass(tiny: ccam.Explainer, batch_size: int) -> None:
    images = noise(3, 3, 32, 48)
    explainer, networks = counting(tiny, batch_size)
    targets: Any = [[4, "ant"], "cat", np.array([1, 2, 0])]
    result = explainer.explain(images, targets)
    assert sum(networks.images) == 3
    assert sum(networks.pairs) == 6
    assert result.targets.tolist() == [4, 0, 2, 1, 2, 0]
    assert result.image_index.tolist() == [0, 0, 1, 2, 2, 2]
    assert len(result.masks) == len(result.weights) == len(result.mic) == len(result) == 6
    assert all(len(layer.labels) == len(layer.count) == 6 for layer in result.layers)
    for pair, (image, target) in enumerate(zip(result.image_index, result.targets, strict=True)):
        alone = tiny.explain(images[image : image + 1], int(target))
        np.testing.assert_allclose(result.saliency[pair], alone.saliency[0], atol=1e-5)
        np.testing.assert_allclose(result.masks[pair], alone.masks[0], atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_ranks_and_names_together_share_one_backbone_pass(
    tiny: ccam.Explainer, batch_size: int
) -> None:
    """Each class of an image once, in the order in which it was named first."""
    images = noise(3, 3, 32, 48)
    explainer, networks = counting(tiny, batch_size)
    ranks = np.argsort(-tiny.explain(images).logits, axis=1)
    best = [int(row[0]) for row in ranks]
    targets: Targets = [[Top(2), "cat", best[0]], [best[1], Top(1)], 4]
    result = explainer.explain(images, targets)
    expected = [list(dict.fromkeys([*map(int, ranks[0, :2]), 2])), [best[1]], [4]]
    assert result.targets.tolist() == [code for codes in expected for code in codes]
    assert result.image_index.tolist() == np.repeat(np.arange(3), list(map(len, expected))).tolist()
    assert sum(networks.images) == 3
    assert sum(networks.pairs) == len(result) == len(result.masks) == len(result.weights)
    for pair, (image, target) in enumerate(zip(result.image_index, result.targets, strict=True)):
        alone = tiny.explain(images[image : image + 1], int(target))
        np.testing.assert_allclose(result.saliency[pair], alone.saliency[0], atol=1e-5)


def test_ranks_of_all_images(tiny: ccam.Explainer) -> None:
    images = noise(2, 3, 32, 48)
    result, same = tiny.explain(images, Top(3)), tiny.explain(images, [Top(3), Top(3)])
    np.testing.assert_array_equal(result.targets, same.targets)
    np.testing.assert_array_equal(result.saliency, same.saliency)
    with pytest.raises(TargetError, match="top is 6; it must be 1 to 5"):
        tiny.explain(images, [0, [1, Top(6)]])


def test_top_classes_come_best_first(tiny: ccam.Explainer) -> None:
    result = tiny.explain(noise(4, 3, 32, 48), Top(3))
    expected = np.argsort(-result.logits, axis=1)[:, :3]
    np.testing.assert_array_equal(result.targets.reshape(4, 3), expected)
    np.testing.assert_array_equal(result.image_index, np.repeat(np.arange(4), 3))


@pytest.mark.parametrize(
    "targets",
    [2, "cat", "2", np.int64(2), [2, "cat", np.int32(2)], (2, [2], ("cat",)), np.full(3, 2)],
    ids=repr,
)
def test_ways_to_name_a_class(tiny: ccam.Explainer, targets: Any) -> None:
    assert tiny.explain(noise(3, 3, 32, 48), targets).targets.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (5, "class 5 is out of range; the bundle has classes 0 to 4"),
        (-1, "class -1 is out of range"),
        ("emu", 'class "emu" is not in the bundle; it has ant, bee, cat, dog, dog'),
        ("dog", r'the name "dog" stands for 3 "dog", 4 "dog"; give a number'),
        ([0], "there are 1 targets for 2 images"),
        (np.arange(3), "there are 3 targets for 2 images"),
        ([0, []], "an image has an empty list of targets; give at least one class"),
        ([0, [1, 9]], "class 9 is out of range"),
        (1.0, "a target is 1.0; it must be the number or name of a class"),
        (True, "a target is True; it must be"),
        ([0, None], "a target is None; it must be"),
        ([0, [[1]]], r"a target is \[1\]; it must be"),
        (np.array([0.0, 1.0]), r"a target is np.float64\(0.0\); it must be"),
        (np.array(1), r"a target is array\(1\); it must be"),
        ({0, 1}, r"a target is \{0, 1\}; it must be"),
    ],
)
def test_unusable_targets_are_refused_first(
    tiny: ccam.Explainer, targets: Any, message: str
) -> None:
    explainer, networks = counting(tiny, 1)
    with pytest.raises(TargetError, match=message):
        explainer.explain(noise(2, 3, 32, 48), targets)
    assert not networks.images


@pytest.mark.parametrize("top", [0, 6, 2.0, True])
def test_top_out_of_range(tiny: ccam.Explainer, top: Any) -> None:
    with pytest.raises(TargetError, match=f"top is {top}; it must be 1 to 5"):
        tiny.explain(noise(1, 3, 32, 48), Top(top))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 32, 48)), r"images are float64\[1, 3, 32, 48\]; the bundle takes"),
        (noise(1, 3, 48, 32), r"float32\[1, 3, 48, 32\]; the bundle takes float32\[B, 3, 32, 48\]"),
        (noise(3, 32, 48), r"images are float32\[3, 32, 48\]"),
        (noise(0, 3, 32, 48), "there are no images to explain"),
        ([], "there are no images to explain"),
        (np.full((1, 3, 32, 48), np.nan, np.float32), "the images have NaN or infinite pixels"),
        (np.full((1, 3, 32, 48), np.inf, np.float32), "the images have NaN or infinite pixels"),
        ("cat.png", "an image is a str; give PIL images or one float32 array"),
        (Path("cat.png"), r"an image is a \w+Path; give PIL images"),
        ([noise(3, 32, 48)], "an image is a ndarray; give PIL images or one float32 array"),
        (None, "an image is a NoneType; give PIL images"),
    ],
)
def test_unusable_images(tiny: ccam.Explainer, images: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        tiny.explain(images)


def test_arrays_and_pictures_give_the_same(digits: ccam.Explainer) -> None:
    pictures = example_pictures()[:2]
    images, geometries = digits.preprocess(pictures)
    from_pictures, from_array = digits.explain(pictures), digits.explain(images)
    np.testing.assert_array_equal(from_array.saliency, from_pictures.saliency)
    assert from_pictures.geometries == geometries
    assert from_pictures.on_original(1).shape == (pictures[1].height, pictures[1].width)
    with pytest.raises(ImageError, match="made from an array, which has no original image"):
        from_array.on_original(0)


def test_masks_are_drawn_anew_and_alike(digits: ccam.Explainer) -> None:
    masks = digits.explain(example_pictures()[:3]).masks
    once, again = masks[1], masks[1]
    assert once is not again
    np.testing.assert_array_equal(once, again)
    assert ((once >= 0) & (once <= 1)).all()
    np.testing.assert_array_equal(masks[1:][0], once)
    np.testing.assert_array_equal((masks[:1] + masks[1:])[-2], once)


def test_masks_of_different_options_can_be_joined(digits: ccam.Explainer) -> None:
    picture = example_pictures()[0]
    options = ccam.CollectionCAM(theta=0.9)
    one, other = digits.explain(picture), digits.explain(picture, method=options)
    np.testing.assert_array_equal((one.masks + other.masks)[1], other.masks[0])
    assert not np.array_equal(one.masks[0], other.masks[0])


def test_threads_give_what_one_thread_gives(digits: ccam.Explainer) -> None:
    """Eight threads at once on one explainer, each with its own image and options."""
    pictures = example_pictures()
    methods = [ccam.CollectionCAM(theta=0.1 * (i % 3), k_max=3 + i) for i in range(8)]

    def explain(index: int) -> ccam.Explanation:
        return digits.explain(pictures[index], method=methods[index])

    serial = [explain(index) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(explain, range(8)))
    for one, other in zip(parallel, serial, strict=True):
        np.testing.assert_array_equal(one.raw_saliency, other.raw_saliency)
        np.testing.assert_array_equal(one.weights[0], other.weights[0])
        assert one.settings == other.settings


def test_two_explainers_live_side_by_side(digits: ccam.Explainer, tiny: ccam.Explainer) -> None:
    picture, images = example_pictures()[0], noise(1, 3, 32, 48)
    before = digits.explain(picture), tiny.explain(images)
    after = tiny.explain(images), digits.explain(picture)
    np.testing.assert_array_equal(before[0].saliency, after[1].saliency)
    np.testing.assert_array_equal(before[1].saliency, after[0].saliency)


def test_results_tell_how_they_were_made(digits: ccam.Explainer) -> None:
    options = ccam.CollectionCAM(theta=0.2, layers=("layer2",))
    result = digits.explain(example_pictures()[:1], method=options)
    assert result.settings == {
        "method": "collection-cam",
        "options": dataclasses.asdict(options),
        "bundle": digits.bundle.manifest.name,
        "backend": "onnxruntime-cpu",
        "precision": "fp32",
        "batch_size": 16,
    }
    assert result.timings.keys() == STAGES
    assert all(seconds > 0 for seconds in result.timings.values())


@pytest.mark.slow
def test_half_precision_is_near_and_not_the_same(
    digits_bundle: Path, digits: ccam.Explainer
) -> None:
    pictures = example_pictures()
    full = digits.explain(pictures)
    with ccam.load(digits_bundle, precision="fp16") as explainer:
        half = explainer.explain(pictures)
    assert half.settings["precision"] == "fp16"
    np.testing.assert_array_equal(half.targets, full.targets)
    assert not np.array_equal(half.logits, full.logits)
    correlations = list(map(spearman, half.saliency, full.saliency))
    assert min(correlations) > 0.8
    assert np.median(correlations) > 0.95


@pytest.mark.slow
def test_batch_size_bounds_what_is_in_flight(digits: ccam.Explainer) -> None:
    """Memory follows batch_size, not the number of images, of classes or of collections."""
    options = ccam.CollectionCAM(k_min=40, k_max=40, layers=("layer3", "layer4"))
    explainer, networks = counting(digits, 7)
    result = explainer.explain(noise(40, 3, 96, 96), method=options)
    assert sum(networks.images) == sum(networks.pairs) == 40
    assert sum(networks.masks) >= 40 * 40
    assert max(networks.images) == max(networks.pairs) == max(networks.masks) == 7
    assert len(result) == 40
    many, networks = counting(digits, 2)
    many.explain(noise(1, 3, 96, 96), [list(range(10))])
    assert networks.images == [1]
    assert max(networks.pairs) == max(networks.masks) == 2


def test_image_of_zeros_has_finite_maps(digits: ccam.Explainer, tiny: ccam.Explainer) -> None:
    for explainer in (digits, tiny):
        shape = explainer.bundle.manifest.input
        result = explainer.explain(np.zeros((2, *shape), np.float32))
        assert np.isfinite(result.saliency).all()
        assert result.saliency.min() >= 0
        assert result.saliency.max() <= 1
        assert all(np.isfinite(mic).all() for mic in result.mic)
        for weights in result.weights:
            assert weights.sum() == pytest.approx(1 if weights.any() else 0, abs=1e-5)


def test_closed_explainer_says_so(tiny_bundle: Path) -> None:
    with ccam.load(tiny_bundle) as explainer:
        explainer.explain(noise(1, 3, 32, 48))
    explainer.close()
    with pytest.raises(BackendError, match="the engine was closed"):
        explainer.explain(noise(1, 3, 32, 48))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"backend": "tpu"}, 'backend "tpu" is unknown; there are auto, tensorrt'),
        ({"precision": "fp16"}, "the bundle has no fp16 graphs, only fp32; export with"),
        ({"threads": -2}, "threads is -2; it must be 0 to 1024"),
    ],
)
def test_unusable_settings(tiny_bundle: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ccam.load(tiny_bundle, **settings)


def test_no_bundle_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"none is not a bundle: there is no such folder"):
        ccam.load(tmp_path / "none")


def test_warming_up_keeps_what_engines_compiled(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[str] = []
    with ccam.load(tiny_bundle, backend="onnxruntime-cpu") as explainer:
        monkeypatch.setattr(GradCAM, "run", lambda *a: kept.append("call"))
        slots = SimpleNamespace(keep_compiled=lambda: kept.append("kept"), close=lambda: None)
        monkeypatch.setattr(explainer.networks, "slots", slots)
        explainer.warm_up(method="grad-cam")
        assert kept == ["call", "kept"]

"""The sanity check passes a method that reads the network, and fails one that does not."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from ccam_deploy import render
from ccam_deploy.arrays import Floats
from ccam_deploy.checks import sanity
from ccam_deploy.engines import Classifier
from ccam_deploy.errors import OptionError, SourceError
from ccam_deploy.export.program import build_program, trace_model
from ccam_deploy.export.randomise import RandomisedClassifier, limited_threads, open_randomised
from ccam_deploy.export.recipe import read_recipe, recipe_settings
from ccam_deploy.fidelity.similarity import hog_similarity
from ccam_deploy.methods import Batch, CollectionCAM, Method, MethodResult, Stopwatch
from ccam_deploy.render import Look
from tests.helpers import DIGITS_LAYERS, RECIPES, noise
from tests.networks import digits_model, tiny
from tests.pictures import places_of

pytest.importorskip("skimage", reason="scikit-image is not installed")


class EdgeDetector(Method):
    """Sobel's gradient of the image: a map that no network has a part in."""

    name = "edges"

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        grey = batch.images[batch.owner].mean(axis=1)
        edges = np.hypot(ndimage.sobel(grey, 1), ndimage.sobel(grey, 2))
        return MethodResult.of_maps(edges.astype(np.float32))


def last_stage(method: Method) -> sanity.Stage:
    """The example classifier with all of its layers random, explained on its own pictures."""
    path = RECIPES / "digits.toml"
    settings = recipe_settings(read_recipe(path), path.parent)
    with limited_threads(1):
        classifier, images = open_randomised(digits_model(), (96, 96), None, settings)
        assert classifier.layers == DIGITS_LAYERS
        check = sanity.compare_randomised(
            classifier, images[:2], method, mean=settings.mean, std=settings.std
        )
        return check.of("cascading")[-1]


def passes(stage: sanity.Stage) -> bool:
    return stage.layer == "stem.0" and stage.spearman < 0.5


@pytest.mark.slow
def test_collection_cam_depends_on_the_network() -> None:
    assert passes(last_stage(CollectionCAM()))


@pytest.mark.slow
def test_an_edge_detector_does_not() -> None:
    stage = last_stage(EdgeDetector())
    assert not passes(stage)
    assert (stage.spearman, stage.ssim, stage.hog) == pytest.approx((1, 1, 1))


@pytest.mark.slow
def test_methods_get_images_as_they_were_normalised() -> None:
    """Black is what the network was trained with as black: the baseline of some methods."""

    class Looks(EdgeDetector):
        seen: ClassVar[list[Floats]] = []

        def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
            self.seen.extend([batch.pixels, batch.colour(0)])
            return super().explain(classifier, batch, clock)

    pixels = np.random.default_rng(0).random((1, 3, 32, 48)).astype(np.float32)
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)
    images = (pixels - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    sanity.compare_randomised(
        tiny_classifier(), images.astype(np.float32), Looks(), 1, mean=mean, std=std
    )
    np.testing.assert_allclose(Looks.seen[0], pixels, atol=1e-6)
    np.testing.assert_allclose(Looks.seen[1].ravel(), [-2, -2, -3], rtol=1e-6)


@pytest.mark.slow
def test_a_map_turned_upside_down_is_alike() -> None:
    """Spearman's correlation of -1 counts as 1, and SSIM tells the two apart."""

    class Turns(EdgeDetector):
        calls: ClassVar[list[int]] = []

        def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
            self.calls.append(1)
            result = super().explain(classifier, batch, clock)
            return result if len(self.calls) == 1 else MethodResult.of_maps(-result.raw_saliency)

    images = noise(2, 3, 32, 48)
    stage = sanity.compare_randomised(
        tiny_classifier(), images, Turns(), 1, mean=(0.0,), std=(1.0,)
    ).stages[0]
    assert stage.spearman == pytest.approx(1)
    assert stage.ssim < 0.5


@pytest.mark.slow
def test_images_too_small_for_ssim() -> None:
    with pytest.raises(OptionError, match="the input is 6x48; SSIM needs 7x7 or more"):
        sanity.compare_randomised(
            tiny_classifier(), noise(1, 3, 6, 48), EdgeDetector(), mean=(0.0,), std=(1.0,)
        )


def tiny_classifier(seed: int = 0) -> RandomisedClassifier:
    program = build_program(trace_model(tiny(), (3, 32, 48)), fold=False)
    return RandomisedClassifier(program, ["relu1", "relu2"], seed)


@pytest.mark.slow
def test_layers_from_the_last_one_down() -> None:
    """Normalisation belongs to the convolution before it."""
    assert tiny_classifier().parts == ("head", "conv2", "conv1")


@pytest.mark.slow
@pytest.mark.parametrize("layers", [("head",), ("conv2",), ("conv1", "head")])
def test_only_these_layers_become_random(layers: tuple[str, ...]) -> None:
    """Compared with the module itself, its layers exchanged for what the classifier drew."""
    classifier, images = tiny_classifier(), noise(2, 3, 32, 48)
    classifier.randomise(layers)
    model = tiny()
    drawn = dict(classifier.program.graph.named_buffers())
    owners = {"norm1": "conv1"}
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            module = name.split(".")[0]
            if owners.get(module, module) in layers and "num_batches" not in name:
                new = next(v for n, v in drawn.items() if n[2:] == name.replace(".", "_"))
                assert value.dim() < 2 or not torch.equal(new, value)
                value.copy_(new)
        expected = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(classifier.backbone(images).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_random_weights_have_the_variance_that_they_should() -> None:
    """2 / fan-in; biases and means 0, scales and variances 1."""
    classifier = tiny_classifier()
    classifier.randomise(classifier.parts)
    values = dict(classifier.program.graph.named_buffers())
    weights = values["p_conv2_weight"]
    assert float(weights.std()) == pytest.approx((2 / (6 * 9)) ** 0.5, rel=0.1)
    assert not values["p_conv2_bias"].any()
    assert not values["b_norm1_running_mean"].any()
    assert (values["b_norm1_running_var"] == 1).all()
    assert (values["p_norm1_weight"] == 1).all()


@pytest.mark.slow
def test_seeds_and_what_was_trained_come_back() -> None:
    classifier, images = tiny_classifier(), noise(1, 3, 32, 48)
    trained = classifier.backbone(images).logits
    logits = []
    for one in (classifier, tiny_classifier(), tiny_classifier(seed=1)):
        one.randomise(one.parts)
        logits.append(one.backbone(images).logits)
    np.testing.assert_array_equal(logits[0], logits[1])
    assert not np.allclose(logits[0], logits[2])
    classifier.randomise(())
    np.testing.assert_array_equal(classifier.backbone(images).logits, trained)


@pytest.mark.slow
def test_the_callers_model_is_left_as_it_was() -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classifier, _ = open_randomised(model, (32, 48))
    classifier.randomise(classifier.parts)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_what_was_not_trained_stays_as_it_is() -> None:
    """Training sets no fixed mean and no fixed blur; a frozen scale is of training."""

    class Prepares(torch.nn.Module):
        mean: torch.Tensor
        blur: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
            self.register_buffer("blur", torch.full((3, 1, 3, 3), 1 / 9))
            self.net = tiny()
            self.frozen = torch.nn.Module()
            self.frozen.register_buffer("weight", torch.full((5,), 3.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            soft = torch.nn.functional.conv2d(x - self.mean, self.blur, groups=3, padding=1)
            scaled: torch.Tensor = self.net(soft) * self.frozen.weight
            return scaled

    program = build_program(trace_model(Prepares(), (3, 32, 48)), fold=False)
    classifier = RandomisedClassifier(program, ["net.relu2"])
    assert classifier.parts == ("net.head", "net.conv2", "net.conv1")
    classifier.randomise(classifier.parts)
    values = dict(program.graph.named_buffers())
    assert (values["b_mean"] == 0.5).all()
    assert torch.allclose(values["b_blur"], torch.tensor(1 / 9))
    assert (values["b_frozen_weight"] == 1).all()


def test_a_model_without_parameters() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x).mean((2, 3))

    program = build_program(trace_model(Fixed(), (3, 32, 48)), fold=False)
    with pytest.raises(SourceError, match="the model has no parameters to randomise"):
        RandomisedClassifier(program, ["relu"])


class Recorded(RandomisedClassifier):
    """Keeps which layers were randomised."""

    asked: list[tuple[str, ...]]

    def randomise(self, parts: Collection[str]) -> None:
        super().randomise(parts)
        self.asked = [*getattr(self, "asked", []), tuple(parts)]


def test_stages_cascade_then_stand_alone_and_end_as_trained() -> None:
    program = build_program(trace_model(tiny(), (3, 32, 48)), fold=False)
    classifier = Recorded(program, ["relu1", "relu2"])
    calls: list[int] = []
    result = sanity.compare_randomised(
        classifier,
        noise(2, 3, 32, 48),
        EdgeDetector(),
        2,
        lambda: calls.append(1),
        mean=(0.0,),
        std=(1.0,),
    )
    both = ("head", "conv2")
    assert classifier.asked == [("head",), both, ("head",), ("conv2",), ()]
    assert [(stage.mode, stage.layer) for stage in result.stages] == [
        (mode, layer) for mode in ("cascading", "independent") for layer in both
    ]
    assert len(calls) == 4
    assert result.targets.shape == (2,)


def test_picture_has_a_row_for_each_image_and_mode() -> None:
    """The image, the trained map, then each stage's map in its column."""
    stream = np.random.default_rng(0)
    maps = stream.random((5, 2, 32, 48)).astype(np.float32)
    modes: list[sanity.Mode] = ["cascading", "cascading", "independent", "independent"]
    stages = [
        sanity.Stage(mode, layer, 0, 0, 0, maps[number])
        for number, mode, layer in zip(range(1, 5), modes, ("head", "conv2") * 2, strict=True)
    ]
    images = [
        Image.fromarray(pixels) for pixels in stream.integers(0, 256, (2, 32, 48, 3), np.uint8)
    ]
    result = sanity.SanityCheck(np.array([3, 1]), maps[0], tuple(stages))
    picture = sanity.picture(result, images, ["cat", "dog"], Look())

    def places(shown: Image.Image) -> list[tuple[int, int]]:
        return places_of(shown.resize((192, 128)), picture)

    tops = []
    for number, image in enumerate(images):
        (left, first), (_, second) = places(image)
        trained, *drawn = (places(render.overlay(image, values[number])) for values in maps)
        assert [y for _, y in trained] == [first, second]
        assert [[y for _, y in peaks] for peaks in drawn] == [[first], [first], [second], [second]]
        columns = [left, trained[0][0], *(x for ((x, _),) in drawn)]
        assert columns[:4] == sorted(set(columns))
        assert columns[4:] == columns[2:4]
        tops += [first, second]
    assert tops == sorted(set(tops))


def test_hog_similarity_of_known_pairs() -> None:
    stripes = np.sin(np.arange(96, dtype=np.float32))[:, None].repeat(96, axis=1)
    assert hog_similarity(stripes, stripes) == pytest.approx(1)
    assert hog_similarity(stripes, 3 * stripes + 1) == pytest.approx(1)
    assert hog_similarity(stripes, stripes.T) < 0
    flat: Floats = np.ones((96, 96), np.float32)
    assert hog_similarity(flat, flat) == 1
    assert hog_similarity(flat, stripes) == 0
    assert hog_similarity(stripes[:32, :20], stripes[:32, :20]) == pytest.approx(1)


def test_without_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.feature", None)
    with pytest.raises(OptionError, match=r"pip install 'ccam-deploy\[sanity\]'"):
        hog_similarity(np.ones((96, 96), np.float32), np.ones((96, 96), np.float32))

"""The sanity check passes a method that reads the network, and fails one that does not."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from ccam_deploy.engines import Classifier
from ccam_deploy.errors import OptionError, SourceError
from ccam_deploy.evaluate import sanity
from ccam_deploy.evaluate.similarity import hog_similarity
from ccam_deploy.export import program as programs
from ccam_deploy.export import recipe as recipes
from ccam_deploy.export.randomise import (
    RandomisedClassifier,
    limited_threads,
    open_randomised,
)
from ccam_deploy.methods import Batch, CollectionCAM, Method, MethodResult, Stopwatch
from ccam_deploy.render import Look
from tests.helpers import DIGITS_LAYERS, RECIPES, Floats, digits_model, noise, tiny

pytest.importorskip("skimage", reason="scikit-image is not installed")


@dataclass(frozen=True)
class NoOptions:
    pass


class EdgeDetector(Method[NoOptions]):
    """Sobel's gradient of the image: a map that no network has a part in."""

    name = "edges"
    options_type = NoOptions

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        grey = batch.images[batch.owner].mean(axis=1)
        edges = np.hypot(ndimage.sobel(grey, 1), ndimage.sobel(grey, 2))
        return MethodResult.of_maps(edges.astype(np.float32))


def last_stage(method: Method[NoOptions] | CollectionCAM) -> sanity.Stage:
    """The example classifier with all of its layers random, explained on its own pictures."""
    path = RECIPES / "digits.toml"
    settings = recipes.settings(recipes.read(path), path.parent)
    with limited_threads(1):
        classifier, images = open_randomised(digits_model(), (96, 96), None, settings)
        assert classifier.layers == DIGITS_LAYERS
        return sanity.check(classifier, images, method).of("cascading")[-1]


def passes(stage: sanity.Stage) -> bool:
    return stage.layer == "stem.0" and stage.spearman < 0.5


@pytest.mark.slow
def test_collection_cam_depends_on_the_network() -> None:
    assert passes(last_stage(CollectionCAM()))


def test_an_edge_detector_does_not() -> None:
    stage = last_stage(EdgeDetector())
    assert not passes(stage)
    assert (stage.spearman, stage.ssim, stage.hog) == pytest.approx((1, 1, 1))


def tiny_classifier(seed: int = 0) -> RandomisedClassifier:
    program = programs.build(programs.trace(tiny(), (3, 32, 48)), fold=False)
    return RandomisedClassifier(program, ["relu1", "relu2"], seed)


def test_layers_from_the_last_one_down() -> None:
    """Normalisation belongs to the convolution before it."""
    assert tiny_classifier().parts == ("head", "conv2", "conv1")


@pytest.mark.parametrize("chosen", [("head",), ("conv2",), ("conv1", "head")])
def test_only_the_chosen_layers_become_random(chosen: tuple[str, ...]) -> None:
    """Compared with the module itself, its layers exchanged for what the classifier drew."""
    classifier, images = tiny_classifier(), noise(2, 3, 32, 48)
    classifier.randomise(chosen)
    model = tiny()
    drawn = dict(classifier._program.graph.named_buffers())
    owners = {"norm1": "conv1"}
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            module = name.split(".")[0]
            if owners.get(module, module) in chosen and "num_batches" not in name:
                new = next(v for n, v in drawn.items() if n[2:] == name.replace(".", "_"))
                assert value.dim() < 2 or not torch.equal(new, value)
                value.copy_(new)
        expected = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(classifier.backbone(images).logits, expected, rtol=1e-4, atol=1e-5)


def test_random_weights_have_the_variance_that_they_should() -> None:
    """2 / fan-in; biases and means 0, scales and variances 1."""
    classifier = tiny_classifier()
    classifier.randomise(classifier.parts)
    values = dict(classifier._program.graph.named_buffers())
    weights = values["p_conv2_weight"]
    assert float(weights.std()) == pytest.approx((2 / (6 * 9)) ** 0.5, rel=0.1)
    assert not values["p_conv2_bias"].any()
    assert not values["b_norm1_running_mean"].any()
    assert (values["b_norm1_running_var"] == 1).all()
    assert (values["p_norm1_weight"] == 1).all()


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


def test_the_callers_model_is_left_as_it_was() -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classifier, _ = open_randomised(model, (32, 48))
    classifier.randomise(classifier.parts)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_parameters() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x).mean((2, 3))

    program = programs.build(programs.trace(Fixed(), (3, 32, 48)), fold=False)
    with pytest.raises(SourceError, match="the model has no parameters to randomise"):
        RandomisedClassifier(program, ["relu"])


class Recorded(RandomisedClassifier):
    """Keeps which layers were randomised."""

    asked: list[tuple[str, ...]]

    def randomise(self, parts: Collection[str]) -> None:
        super().randomise(parts)
        self.asked = [*getattr(self, "asked", []), tuple(parts)]


def test_stages_cascade_then_stand_alone_and_end_as_trained() -> None:
    program = programs.build(programs.trace(tiny(), (3, 32, 48)), fold=False)
    classifier = Recorded(program, ["relu1", "relu2"])
    calls: list[int] = []
    result = sanity.check(
        classifier, noise(2, 3, 32, 48), EdgeDetector(), 2, lambda: calls.append(1)
    )
    both = ("head", "conv2")
    assert classifier.asked == [("head",), both, ("head",), ("conv2",), ()]
    assert [(stage.mode, stage.layer) for stage in result.stages] == [
        (mode, layer) for mode in ("cascading", "independent") for layer in both
    ]
    assert len(calls) == 4
    shown = [Image.new("RGB", (48, 32))] * 2
    picture = sanity.picture(result, shown, ["cat", "dog"], Look())
    assert picture.height > 4 * 128


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

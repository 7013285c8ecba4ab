"""Trained ImageNet networks, exported as their recipes say, know what photographs show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ccam_deploy as ccam
from ccam_deploy.bundle.manifest import PrecisionName, Preprocessing
from ccam_deploy.export.recipe import read_recipe, recipe_model, recipe_settings
from ccam_deploy.export.settings import IMAGENET_MEAN, IMAGENET_STD
from ccam_deploy.image_files import load_image
from ccam_deploy.preprocess import prepare_images
from tests.bundles import export_recipe
from tests.helpers import PHOTOGRAPHS, RECIPES

SHOWN = {
    "cat": {"tabby", "tiger cat", "Egyptian cat"},
    "espresso": {"espresso"},
    "palace": {"palace"},
    "rocket": {"missile", "projectile", "space shuttle"},
    "tripod": {"tripod"},
}
"""What some photographs show; a network's best class must be one of these."""


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [load_image(PHOTOGRAPHS / f"{name}.jpg") for name in SHOWN]


def best_five(
    bundle: Path, pictures: list[Image.Image], precision: PrecisionName = "fp32"
) -> Iterator[list[str]]:
    """The names of each picture's five best classes, by the graph that sees masked images."""
    with ccam.load(bundle, backend="onnxruntime-cpu", precision=precision) as explainer:
        images, _ = explainer.preprocess(pictures)
        whole = np.ones((len(images), *images.shape[2:]), np.float32)
        rows = np.arange(len(images))
        for row_logits in explainer.networks.masked_logits(images, whole, rows):
            yield [explainer.bundle.manifest.label(int(i)) for i in np.argsort(-row_logits)[:5]]


def test_the_best_class_is_what_the_photograph_shows(
    lite0_bundle: Path, pictures: list[Image.Image]
) -> None:
    for classes, best in zip(SHOWN.values(), best_five(lite0_bundle, pictures), strict=True):
        assert best[0] in classes
        assert classes <= set(best)


@pytest.mark.nightly
@pytest.mark.parametrize("size", [0, 1, 2])
def test_every_size_knows_it_in_every_precision(
    size: int, pictures: list[Image.Image], tmp_path: Path
) -> None:
    """The export holds each precision to its tolerance; no class is lost to rounding either."""
    export_recipe(f"efficientnet_lite{size}", tmp_path / "bundle", "int8")
    for precision in ("fp32", "fp16", "int8"):
        best = best_five(tmp_path / "bundle", pictures, precision)
        for classes, names in zip(SHOWN.values(), best, strict=True):
            assert classes & set(names)


@pytest.mark.slow
def test_photographs_are_prepared_as_for_the_training(pictures: list[Image.Image]) -> None:
    """(pixel - 127) / 128: with ImageNet's usual mean and deviation the network is less sure."""
    recipe = read_recipe(RECIPES / "efficientnet_lite0.toml")
    assert np.allclose(np.multiply(recipe.input.mean, 255), 127, atol=1e-5)
    assert np.allclose(np.multiply(recipe.input.std, 255), 128, atol=1e-5)
    model = recipe_model(recipe, RECIPES).eval()
    labels = recipe_settings(recipe, RECIPES).labels
    own = sureness(model, pictures, recipe.input.mean, recipe.input.std, labels)
    usual = sureness(model, pictures, IMAGENET_MEAN, IMAGENET_STD, labels)
    assert own > usual + 0.04


def sureness(
    model: nn.Module,
    pictures: list[Image.Image],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    labels: tuple[str, ...],
) -> float:
    """The mean probability of what the photographs show."""
    images, _ = prepare_images(
        pictures, (224, 224), Preprocessing("crop", (256, 256), "bicubic", mean, std)
    )
    with torch.no_grad():
        probabilities = model(torch.from_numpy(images)).softmax(1).numpy()
    shown = [
        sum(row[labels.index(name)] for name in classes)
        for row, classes in zip(probabilities, SHOWN.values(), strict=True)
    ]
    return float(np.mean(shown))

"""Every recipe exports, with random weights, and its graphs compute what the network computes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import ccam_deploy as ccam
from ccam_deploy.export import export, sources
from ccam_deploy.export import recipe as recipes
from ccam_deploy.export.exporter import photographs
from tests.helpers import RECIPES, features_and_gradients

NETWORKS = sorted(path.stem for path in RECIPES.glob("*.toml") if path.stem != "digits")


def test_all_promised_recipes_exist() -> None:
    assert {
        "convnext_tiny",
        "densenet121",
        "efficientnet_b0",
        "mobilenet_v3_large",
        "regnet_y_400mf",
        "resnet101",
        "resnet18",
        "resnet50",
        "vgg19",
    } == set(NETWORKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_recipe_exports_and_explains(name: str, tmp_path: Path) -> None:
    sources.import_module("torchvision.models")
    path = RECIPES / f"{name}.toml"
    recipe = recipes.read(path)
    model = recipes.random_model(recipe)
    settings = dataclasses.replace(
        recipes.settings(recipe, path.parent),
        random_weights=True,
        tolerance=recipe.random_tolerance,
    )
    bundle = export(model, tmp_path / name, recipe.input.size, None, "fp32", settings)
    assert bundle.manifest.random_weights
    assert len(bundle.manifest.labels) == bundle.manifest.classes == 1000
    assert len(bundle.manifest.layers) == 4
    with ccam.load(bundle, "onnxruntime-cpu") as explainer:
        images, _ = explainer.preprocess(photographs())
        result = explainer.explain(images[:1])
        assert np.isfinite(result.saliency).all()
        assert result.saliency.max() == 1
        _check_against_model(explainer, model, images)


def _check_against_model(
    explainer: ccam.Explainer, model: torch.nn.Module, images: np.ndarray
) -> None:
    """The network itself, with hooks on the target layers that are modules."""
    modules = dict(model.named_modules())
    names = [layer.name for layer in explainer.bundle.manifest.layers]
    hooked = [name for name in names if name in modules]
    assert len(hooked) >= 3
    activations = explainer.networks.backbone(images)
    classes = activations.logits.argmax(1)
    gradients = explainer.networks.gradients(activations, np.eye(1000, dtype=np.float32)[classes])
    logits, features, expected = features_and_gradients(
        model, torch.from_numpy(images.copy()), hooked, classes.tolist()
    )
    np.testing.assert_allclose(activations.logits, logits, atol=2e-3 * float(logits.abs().max()))
    for index, name in enumerate(hooked):
        place = names.index(name)
        assert _relative(activations.features[place], features[index].numpy()) < 1e-2
        assert _relative(gradients[place], expected[index].numpy()) < 0.2


def _relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))

"""Fixtures of the methods' tests: bundles beside the PyTorch networks that they were made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

import ccam_deploy as ccam
from ccam_deploy.examples.photographs import photographs
from ccam_deploy.export import ExportSettings, export
from ccam_deploy.export.architecture import import_module
from ccam_deploy.export.recipe import random_model, read_recipe, recipe_settings
from tests.helpers import RECIPES, example_pictures
from tests.methods.peers import Case
from tests.networks import digits_model, tiny


@pytest.fixture(scope="session")
def resnet18_case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """ResNet-18 with random weights, on two photographs."""
    import_module("torchvision.models")
    path = RECIPES / "resnet18.toml"
    recipe = read_recipe(path)
    model = random_model(recipe)
    settings = dataclasses.replace(
        recipe_settings(recipe, path.parent),
        random_weights=True,
        head=True,
        gradients=True,
    )
    folder = tmp_path_factory.mktemp("bundles") / "resnet18"
    with ccam.load(export(model, folder, recipe.input.size, None, "fp32", settings)) as explainer:
        images, _ = explainer.preprocess(photographs()[:2])
        yield Case(explainer, model.eval(), images, (3, 281))


@pytest.fixture(scope="session")
def headed_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network's bundle with all graphs, which every method can run on."""
    folder = tmp_path_factory.mktemp("bundles") / "headed"
    export(tiny(), folder, (32, 48), None, "fp32", ExportSettings(head=True, gradients=True))
    return folder


@pytest.fixture
def digits_case(digits: ccam.Explainer) -> Case:
    """The trained example classifier on its eight pictures."""
    images, _ = digits.preprocess(example_pictures())
    classes = digits.networks.backbone(images).logits.argmax(axis=1)
    return Case(digits, digits_model(), images, tuple(map(int, classes)))


@pytest.fixture(
    params=["digits_case", pytest.param("resnet18_case", marks=pytest.mark.slow)],
    ids=["digits", "resnet18"],
)
def case(request: pytest.FixtureRequest) -> Case:
    """Both of them, one after the other."""
    found: Case = request.getfixturevalue(request.param)
    return found

"""Fixtures of the methods' tests: bundles beside the PyTorch networks that they were made of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import ccam_deploy as ccam
from ccam_deploy.examples.photographs import photographs
from tests.helpers import RECIPES, example_pictures
from tests.methods.peers import Case
from tests.networks import digits_model


@pytest.fixture(scope="session")
def resnet18_case(resnet18_bundle: Path) -> Iterator[Case]:
    """ResNet-18 with random weights, on two photographs."""
    from ccam_deploy.export.architecture import import_module
    from ccam_deploy.export.recipe import random_model, read_recipe

    import_module("torchvision.models")
    model = random_model(read_recipe(RECIPES / "resnet18.toml"))
    with ccam.load(resnet18_bundle) as explainer:
        images, _ = explainer.preprocess(photographs()[:2])
        yield Case(explainer, model.eval(), images, (3, 281))


@pytest.fixture
def digits_case(digits: ccam.Explainer) -> Case:
    """The trained example classifier on its eight pictures."""
    images, _ = digits.preprocess(example_pictures())
    classes = digits.networks.backbone(images).logits.argmax(axis=1)
    return Case(digits, digits_model(), images, tuple(map(int, classes)))


@pytest.fixture(
    params=["digits_case", pytest.param("resnet18_case", marks=pytest.mark.nightly)],
    ids=["digits", "resnet18"],
)
def case(request: pytest.FixtureRequest) -> Case:
    """Both of them, one after the other."""
    found: Case = request.getfixturevalue(request.param)
    return found

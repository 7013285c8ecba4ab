"""Fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

import ccam_deploy as ccam
from ccam_deploy.engines.cuda.pycuda import CudaDevice
from ccam_deploy.errors import BackendError
from ccam_deploy.export import ExportSettings, export
from ccam_deploy.export.recipe import read_recipe, recipe_settings
from tests.helpers import RECIPES
from tests.networks import digits_model, tiny


@cache
def _why_no_gpu() -> str:
    """What is missing for the tests that need a GPU; empty where they can run."""
    try:
        CudaDevice().close()
    except BackendError as error:
        return str(error)
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and _why_no_gpu():
        pytest.skip(_why_no_gpu())


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example classifier's bundle, with both precisions. Do not change it: copy it."""
    return _export_digits(tmp_path_factory.mktemp("bundles") / "digits", gradients=False)


@pytest.fixture(scope="session")
def gradients_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the graphs of the image's gradient. Do not change it: copy it."""
    return _export_digits(tmp_path_factory.mktemp("bundles") / "gradients", gradients=True)


def _export_digits(folder: Path, gradients: bool) -> Path:
    path = RECIPES / "digits.toml"
    recipe = read_recipe(path)
    settings = replace(recipe_settings(recipe, path.parent), gradients=gradients)
    export(digits_model(), folder, recipe.input.size, None, "fp16", settings)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network's bundle, 32 × 48 pixels. Do not change it: copy it."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    settings = ExportSettings(labels=("ant", "bee", "cat", "dog", "dog"))
    export(tiny(), folder, (32, 48), None, "fp32", settings)
    return folder


@pytest.fixture
def digits(digits_bundle: Path) -> Iterator[ccam.Explainer]:
    with ccam.load(digits_bundle) as explainer:
        yield explainer


@pytest.fixture
def differentiable(gradients_bundle: Path) -> Iterator[ccam.Explainer]:
    with ccam.load(gradients_bundle) as explainer:
        yield explainer

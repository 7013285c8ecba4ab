"""Every recipe exports, with random weights; its graphs compute what the network computes, and
TensorRT builds all of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import numpy as np
import pytest

import ccam_deploy as ccam
from ccam_deploy.bundle.folder import Bundle, read_bundle
from ccam_deploy.bundle.manifest import PrecisionName
from ccam_deploy.engines.tensorrt import plans
from ccam_deploy.engines.tensorrt.library import load_library
from ccam_deploy.examples.photographs import photographs
from ccam_deploy.export.architecture import import_module
from ccam_deploy.export.recipe import Recipe, random_model, read_recipe, recipe_settings
from tests.bundles import export_recipe
from tests.export.agreement import assert_agrees
from tests.helpers import RECIPES

NETWORKS = sorted(path.stem for path in RECIPES.glob("*.toml") if path.stem != "digits")
DEVICE = "8.9"


def recipe_named(name: str) -> Recipe:
    import_module("torchvision.models")
    return read_recipe(RECIPES / f"{name}.toml")


@pytest.fixture(scope="module", params=NETWORKS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bundle]:
    """A recipe's bundle. The folders of networks take gigabytes, so each is removed again."""
    folder = tmp_path_factory.mktemp("recipe") / request.param
    export_recipe(request.param, folder, "fp16", random_weights=True)
    yield read_bundle(folder)
    shutil.rmtree(folder)


def test_all_promised_recipes_exist() -> None:
    assert {
        "convnext_tiny",
        "densenet121",
        "efficientnet_b0",
        "efficientnet_lite0",
        "efficientnet_lite1",
        "efficientnet_lite2",
        "mobilenet_v3_large",
        "regnet_y_400mf",
        "resnet101",
        "resnet18",
        "resnet50",
        "vgg19",
    } == set(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
def test_classes_have_the_names_of_imagenet(name: str) -> None:
    labels = recipe_settings(recipe_named(name), RECIPES).labels
    assert len(labels) == 1000
    assert (labels[0], labels[281]) == ("tench", "tabby")


@pytest.mark.nightly
def test_recipe_exports_and_explains(exported: Bundle) -> None:
    assert exported.manifest.random_weights
    assert len(exported.manifest.labels) == exported.manifest.classes == 1000
    assert len(exported.manifest.layers) == 4
    model = random_model(recipe_named(exported.manifest.name))
    with ccam.load(exported, backend="onnxruntime-cpu") as explainer:
        images, _ = explainer.preprocess(photographs())
        result = explainer.explain(images[:1])
        assert np.isfinite(result.saliency).all()
        assert result.saliency.max() == 1
        assert_agrees(explainer, model, images)


@pytest.mark.nightly
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_builds_every_graph(exported: Bundle, precision: PrecisionName) -> None:
    """For one kind of GPU, and for all sizes of batches: the profile that the time goes to."""
    pytest.importorskip("tensorrt_rtx")
    library = load_library("tensorrt-rtx")
    throughput = plans.profiles(plans.DEFAULT_MAX_BATCH)[1:]
    graphs = exported.precision(precision).graphs
    assert set(graphs) == {"backbone", "gradient", "classifier"}
    for file in graphs.values():
        plan = plans.build_plan(library, exported.path(file), throughput, [DEVICE])
        assert len(plan) > 1_000_000

"""Every recipe exports, with random weights; its graphs compute what the network computes, and
TensorRT builds all of them.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import ccam_deploy as ccam
from ccam_deploy.bundle.folder import Bundle, read_bundle
from ccam_deploy.bundle.manifest import PrecisionName
from ccam_deploy.engines.tensorrt import plans
from ccam_deploy.engines.tensorrt.library import load_library
from ccam_deploy.examples.photographs import photographs
from ccam_deploy.export import export
from ccam_deploy.export.architecture import import_module
from ccam_deploy.export.recipe import Recipe, random_model, read_recipe, recipe_settings
from tests.helpers import RECIPES
from tests.reference import features_and_gradients

NETWORKS = sorted(path.stem for path in RECIPES.glob("*.toml") if path.stem != "digits")
PROCESSES = 2
DEVICE = "8.9"


def recipe_named(name: str) -> Recipe:
    import_module("torchvision.models")
    return read_recipe(RECIPES / f"{name}.toml")


def export_recipe(name: str, folder: Path) -> None:
    """Export a recipe's network in both precisions, in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    recipe = recipe_named(name)
    settings = dataclasses.replace(
        recipe_settings(recipe, RECIPES),
        random_weights=True,
    )
    export(random_model(recipe), folder, recipe.input.size, None, "fp16", settings)


@pytest.fixture(scope="module")
def exports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Path, Future[None]]]]:
    """The exports of the recipes that are tested here: where each goes, and when it is done.

    Tracing a network keeps one core busy, so two are traced at a time.
    """
    folder = tmp_path_factory.mktemp("recipes")
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = {p.params["exported"] for p in parameters if p and "exported" in p.params}
    pool = ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn"))
    try:
        yield {
            name: (folder / name, pool.submit(export_recipe, name, folder / name))
            for name in NETWORKS
            if name in wanted
        }
    finally:
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module", params=NETWORKS)
def exported(
    request: pytest.FixtureRequest, exports: dict[str, tuple[Path, Future[None]]]
) -> Iterator[Bundle]:
    """A recipe's bundle. The folders of networks take gigabytes, so each is removed again."""
    folder, done = exports[request.param]
    done.result()
    yield read_bundle(folder)
    shutil.rmtree(folder)


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
        _check_against_model(explainer, model, images)


@pytest.mark.slow
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

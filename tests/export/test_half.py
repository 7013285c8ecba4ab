"""Half precision of the classifier alone: partitions and masks are those of float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import ccam_deploy as ccam
from ccam_deploy.bundle.folder import Bundle, read_bundle
from ccam_deploy.bundle.manifest import GraphPrecision
from ccam_deploy.engines.onnxruntime import OnnxRuntimeEngine
from ccam_deploy.errors import OptionError, ToleranceError
from ccam_deploy.export import ExportSettings, export
from ccam_deploy.export.recipe import read_recipe, recipe_settings
from tests.command import success
from tests.helpers import noise
from tests.networks import tiny

SIZE = (32, 48)
IMPOSSIBLE: Mapping[GraphPrecision, Mapping[str, float]] = {"fp16": {"saliency_rank": 1.5}}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("half") / "tiny"
    return export(tiny(), folder, SIZE, None, "fp16", ExportSettings(half="classifier"))


@pytest.mark.slow
def test_only_the_classifier_is_rounded(bundle: Bundle) -> None:
    whole, half = bundle.precision("fp32"), bundle.precision("fp16")
    assert half.graphs == {**whole.graphs, "classifier": "classifier.fp16.onnx"}
    assert half.gradient_scale == 1
    assert not list(bundle.folder.glob("backbone.*.onnx"))
    with OnnxRuntimeEngine(bundle.path(half.graphs["classifier"]), "cpu") as engine:
        types = {spec.name: spec.dtype for spec in engine.inputs}
    assert types["images"] == types["masks"] == np.dtype(np.float16)


@pytest.mark.slow
def test_partitions_and_masks_are_those_of_float32(bundle: Bundle) -> None:
    """To the bit; the weights differ by the rounding of the masked images' logits."""
    images = noise(3, 3, *SIZE)
    results = []
    for precision in ("fp32", "fp16"):
        with ccam.load(bundle, precision=precision, backend="onnxruntime-cpu") as explainer:
            results.append(explainer.explain(images))
    whole, half = results
    for layer, expected in zip(half.layers, whole.layers, strict=True):
        assert np.array_equal(layer.labels, expected.labels)
    for pair in range(3):
        assert np.array_equal(half.masks[pair], whole.masks[pair])
        assert not np.array_equal(half.weights[pair], whole.weights[pair])
        assert np.allclose(half.weights[pair], whole.weights[pair], rtol=1e-2)
    measured = [bundle.precision(name).fidelity for name in ("fp32", "fp16")]
    assert [fidelity.partitions for fidelity in measured] == [1, 1]
    assert measured[0].gradients == measured[1].gradients
    success("verify", bundle.folder, "--precision", "fp16")


@pytest.mark.slow
def test_a_broken_bound_tells_what_rounds_less(tmp_path: Path) -> None:
    settings = ExportSettings(tolerance=IMPOSSIBLE)
    with pytest.raises(ToleranceError, match=r'1\.5; half "classifier" \(--half classifier\) rou'):
        export(tiny(), tmp_path / "tiny", SIZE, None, "fp16", settings)
    settings = ExportSettings(tolerance=IMPOSSIBLE, half="classifier")
    with pytest.raises(ToleranceError, match=r"is below 1\.5$"):
        export(tiny(), tmp_path / "tiny", SIZE, None, "fp16", settings)


RECIPE = """
name = "n"
arch = "tests.networks:tiny"
[input]
size = [32, 48]
"""


def test_settings_and_recipes_say_which_graphs(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    for line, half in (("", "all"), ('half = "classifier"', "classifier")):
        path.write_text(line + RECIPE)
        assert recipe_settings(read_recipe(path), tmp_path).half == half
    path.write_text('half = "none"' + RECIPE)
    with pytest.raises(OptionError, match=r"Invalid enum value 'none' - at `\$\.half`"):
        read_recipe(path)
    with pytest.raises(OptionError, match=r'^half is "none"; it must be all or classifier$'):
        ExportSettings(half="none")  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_option_goes_before_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('half = "classifier"' + RECIPE)
    words = ("export", "--recipe", path, "--random-weights", "--precision", "fp16")
    success(*words, "--half", "all", "--output", tmp_path / "n")
    graphs = read_bundle(tmp_path / "n").precision("fp16").graphs
    assert graphs["backbone"] == "backbone.fp16.onnx"

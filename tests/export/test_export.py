"""Exports: the model is left alone, its bundle is exact, and what cannot be exported is named."""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim

import ccam_deploy as ccam
from ccam_deploy.bundle.folder import read_bundle
from ccam_deploy.errors import (
    BundleError,
    CcamError,
    LayerError,
    LoweringError,
    OptionError,
    SourceError,
    ToleranceError,
)
from ccam_deploy.export import ExportSettings, export
from ccam_deploy.export.architecture import Model
from ccam_deploy.export.program import trace_model
from ccam_deploy.export.recipe import random_model, read_recipe, recipe_model, recipe_settings
from ccam_deploy.export.sources import load_model
from tests.helpers import RECIPES, noise
from tests.networks import Detached, Net, TinyNet, tiny
from tests.reference import features_and_gradients

SIZE = (32, 48)


@pytest.mark.slow
def test_the_model_is_left_as_it_was(tiny_bundle: Path, tmp_path: Path) -> None:
    """In training mode, partly frozen, with gradients and a hook: the same bundle comes out."""
    model = tiny().train()
    model.norm1.eval()
    model.conv1.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    calls: list[nn.Module] = []
    model.conv2.register_forward_hook(lambda module, inputs, output: calls.append(module))
    modes = [module.training for module in model.modules()]
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random, enabled = torch.get_rng_state(), torch.is_grad_enabled()
    export(model, tmp_path / "tiny", SIZE)
    assert [module.training for module in model.modules()] == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    assert [len(module._forward_hooks) for module in model.modules()].count(1) == 1
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert model.conv2.weight.grad is None
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled() == enabled
    for name in ("backbone.onnx", "gradient.onnx", "classifier.onnx", "weights.bin"):
        assert (tmp_path / "tiny" / name).read_bytes() == (tiny_bundle / name).read_bytes(), name


@pytest.mark.slow
def test_the_current_folder_becomes_a_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    bundle = export(tiny(), ".", SIZE)
    assert (bundle.manifest.name, bundle.folder) == ("mine", tmp_path / "mine")


@pytest.mark.slow
def test_a_convolution_before_its_normalisation(tmp_path: Path) -> None:
    """It is folded away by default; named as a layer, it keeps its own output."""
    bundle = export(tiny(), tmp_path / "tiny", SIZE, ["relu2", "conv1"])
    assert [layer.name for layer in bundle.manifest.layers] == ["conv1", "relu2"]
    images = noise(4, 3, *SIZE)
    classes = [0, 1, 4, 2]
    logits, features, gradients = features_and_gradients(
        tiny(), torch.from_numpy(images.copy()), ["conv1", "relu2"], classes
    )
    with ccam.load(bundle) as explainer:
        got = explainer.networks.backbone(images)
        one_hot = np.eye(5, dtype=np.float32)[classes]
        got_gradients = explainer.networks.gradients(got, one_hot)
    np.testing.assert_allclose(got.logits, logits.numpy(), atol=1e-5)
    for mine, theirs in zip(got.features, features, strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), atol=1e-5)
    for mine, theirs in zip(got_gradients, gradients, strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), atol=1e-6)


@pytest.mark.slow
def test_grey_images_and_what_the_manifest_records(tmp_path: Path) -> None:
    settings = ExportSettings(
        mean=(0,),
        std=(1,),
        resize="stretch",
        cover=(40, 60),
        labels=tuple("abcde"),
        name="grey",
        source="a test",
        random_weights=True,
    )
    manifest = export(tiny(1), tmp_path / "bundle", SIZE, None, "fp32", settings).manifest
    assert (manifest.name, manifest.source, manifest.random_weights) == ("grey", "a test", True)
    assert manifest.input == (1, 32, 48)
    assert manifest.labels == ("a", "b", "c", "d", "e")
    how = manifest.preprocessing
    assert (how.resize, how.cover, how.mean, how.std) == ("stretch", (40, 60), (0.0,), (1.0,))
    assert manifest.tools["torch"] in (torch.__version__, torch.__version__.split("+")[0])
    picture = Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64).astype(np.uint8))
    with ccam.load(tmp_path / "bundle") as explainer:
        images, _ = explainer.preprocess([picture])
        result = explainer.explain(picture)
    assert images.shape == (1, 1, 32, 48)
    assert result.saliency.shape == (1, 32, 48)
    with torch.no_grad():
        expected = tiny(1)(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(result.logits, expected, atol=1e-5)


def test_half_precision_adds_graphs(digits_bundle: Path) -> None:
    bundle = read_bundle(digits_bundle)
    whole, half = (bundle.precision(name) for name in ("fp32", "fp16"))
    assert whole.gradient_scale == 1
    assert half.gradient_scale > 0
    assert math.frexp(half.gradient_scale)[0] == 0.5
    for precision, dtype in ((whole, onnx.TensorProto.FLOAT), (half, onnx.TensorProto.FLOAT16)):
        for file in precision.graphs.values():
            model = onnx.load(bundle.path(file), load_external_data=False)
            assert model.graph.output[0].type.tensor_type.elem_type == dtype, file
    images = np.load(bundle.path(half.reference))["images"][:2]
    found = []
    for kind in ("fp32", "fp16"):
        with ccam.load(bundle, precision=kind) as explainer:
            activations = explainer.networks.backbone(images)
            found.append(explainer.networks.gradients(activations, np.eye(2, 10, dtype="f4")))
    for one, other in zip(*found, strict=True):
        assert np.linalg.norm(one - other) < 0.1 * np.linalg.norm(one)


def test_no_graph_computes_with_sizes(digits_bundle: Path) -> None:
    """Engines do that on the CPU, and cannot capture it: the batch is left for them to infer."""
    bundle = read_bundle(digits_bundle)
    for precision in bundle.manifest.precisions.values():
        assert set(precision.graphs) == {"backbone", "gradient", "classifier"}
        for file in precision.graphs.values():
            model = onnx.load(bundle.path(file), load_external_data=False)
            assert not {node.op_type for node in model.graph.node} & {"Shape", "Size", "Range"}


@pytest.mark.slow
def test_impossible_tolerance(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "tiny")
    before = (tmp_path / "tiny" / "manifest.json").read_bytes()
    settings = ExportSettings(tolerance={"fp32": {"saliency_rank": 1.5}})
    with pytest.raises(ToleranceError) as raised:
        export(tiny(), tmp_path / "tiny", SIZE, None, "fp32", settings)
    message = r"the fp32 graphs do not agree with PyTorch: saliency_rank [\d.]+ is below 1\.5"
    assert re.fullmatch(message, str(raised.value))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert (tmp_path / "tiny" / "manifest.json").read_bytes() == before


class TwoOutputs(Net):
    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return logits, logits.softmax(1)


class ByValue(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if bool(x.sum() > 0) else torch.zeros(len(x), 5)


class Uncopied(Net):
    def __deepcopy__(self, memo: object) -> Net:
        raise RuntimeError("this holds a socket")


def of_the_batch() -> nn.Module:
    """The normalisation is by all images, before the first layer that `layers` names."""
    return Net(lambda x: x - x.mean(0, keepdim=True))


def by_the_batch_after_a_layer() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2),
        nn.ReLU(),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.Flatten(),
        nn.Linear(4 * 15 * 23, 5),
    )


def fixed_batch() -> Model:
    return torch.export.export(tiny(), (torch.zeros(2, 3, *SIZE),))


def in_double() -> Model:
    images = torch.zeros(2, 3, *SIZE, dtype=torch.float64)
    return torch.export.export(tiny().double(), (images,), dynamic_shapes=({0: Dim("batch")},))


@pytest.mark.parametrize(
    ("make", "layers", "error", "message"),
    [
        (
            tiny,
            ["relu2", "layer5"],
            LayerError,
            'layer "layer5" is not in the model; it has norm1, relu1, conv2, relu2',
        ),
        (
            tiny,
            ["head"],
            LayerError,
            'layer "head" gives no feature map [batch, channels, height, width], nor tokens '
            "of one; these do: norm1, relu1, conv2, relu2",
        ),
        pytest.param(
            *(tiny, ["relu2", "relu2"], LayerError),
            "the layers relu2, relu2 do not name different feature maps",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(Detached, ["aside"], LayerError),
            'the logits do not depend on layer "aside"',
            marks=pytest.mark.slow,
        ),
        (
            TwoOutputs,
            None,
            SourceError,
            "the model returns tuple of 0 [1, 5], 1 [1, 5], several of which may be logits",
        ),
        (
            fixed_batch,
            None,
            SourceError,
            "the program has a fixed batch; export it again with "
            'dynamic_shapes=({0: torch.export.Dim("batch")},)',
        ),
        (
            in_double,
            None,
            SourceError,
            "the program takes torch.float64; export the model in float32",
        ),
        (
            lambda: nn.Conv2d(3, 5, 3),
            None,
            SourceError,
            "it must be [batch, classes]",
        ),
        (
            ByValue,
            None,
            SourceError,
            "torch.export cannot trace the model on images of 3x32x48: Could not guard on",
        ),
        (
            Uncopied,
            None,
            SourceError,
            "the model cannot be copied (this holds a socket); "
            "export it with torch.export and pass the .pt2 file",
        ),
        pytest.param(
            *(of_the_batch, None, SourceError),
            "the logits of an image depend on the other images of its batch",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), tiny()),
            None,
            SourceError,
            "the logits of an image depend on the other images of its batch",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda: Net(lambda x: x + 0.1 * x.mean(0, keepdim=True)),
            ["stem"],
            SourceError,
            "the logits of an image depend on the other images of its batch",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(by_the_batch_after_a_layer, ["1"], LoweringError),
            "which an operator makes of all images of a batch",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda: Net(
                lambda x: ((x.flatten(1) @ x.flatten(1).T).softmax(1) @ x.flatten(1)).reshape_as(x)
            ),
            ["stem"],
            LoweringError,
            "a gradient takes [batch, batch], which an operator makes of all images of a batch",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda: Net(lambda x: (1e7 * x).sin()),
            ["stem"],
            ToleranceError,
            "the fp32 graphs do not agree with PyTorch: in PyTorch itself the logits change by ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda: Net(lambda x: x.median(3, keepdim=True)[0]),
            ["stem"],
            LoweringError,
            'median in layer "body" has no form in ONNX',
            marks=pytest.mark.slow,
        ),
    ],
)
def test_models_that_cannot_be_exported(
    tmp_path: Path,
    make: Callable[[], Model],
    layers: list[str] | None,
    error: type[CcamError],
    message: str,
) -> None:
    with pytest.raises(error) as raised:
        export(make(), tmp_path / "a" / "bundle", SIZE, layers)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": (0.5,)}, "mean and std have 1 and 3 values; both need 1, or both 3"),
        (
            {"mean": (0.5,) * 2, "std": (0.5,) * 2},
            "mean and std have 2 and 2 values; both need 1, or both 3",
        ),
        ({"std": (1, 0, 1)}, "std is (1, 0, 1); every value must be above 0"),
        ({"std": (1, math.nan, 1)}, "they must be finite"),
        ({"mean": (0, math.inf, 1)}, "they must be finite"),
        ({"tolerance": {"fp32": {"logit": 1}}}, 'tolerance "fp32.logit" is unknown; there are log'),
        (
            {"tolerance": {"tf32": {}}},
            'tolerance "tf32" is unknown; an export checks fp32, fp16',
        ),
        ({"labels": ("a", "b")}, "there are 2 labels for the model's 5 classes"),
        ({"labels": "abcde"}, 'labels is "abcde"; it must be a name for each class'),
        ({"resize": "fit"}, 'resize is "fit"; it must be one of crop, '),
        (
            {"interpolation": "linear"},
            'interpolation is "linear"; it must be one of nearest, bilinear',
        ),
        ({"cover": (70.5, 70)}, "cover is (70.5, 70); height and width must be whole numbers"),
        ({"cover": (31, 48)}, "cover is (31, 48); it must not be smaller than the input (32, 48)"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as raised:
        export(tiny(), tmp_path / "bundle", SIZE, None, "fp32", ExportSettings(**settings))
    assert message in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r'^precision "fp64" is unknown; there are fp32, tf32, fp16, int8, fp8$'
    ):
        export(tiny(), tmp_path / "bundle", SIZE, None, "fp64")
    with pytest.raises(OptionError, match=r"^input_size is \(4, 48\); both must be 8 or more$"):
        export(tiny(), tmp_path / "bundle", (4, 48))
    grey = trace_model(tiny(1), (1, *SIZE))
    with pytest.raises(OptionError, match=r"^the model takes 1 channels, mean and std have 3 val"):
        export(grey, tmp_path / "bundle")
    (tmp_path / "file").touch()
    steps: list[str] = []
    with pytest.raises(BundleError, match=r"file exists and is not a bundle; choose another"):
        export(tiny(), tmp_path / "file", SIZE, settings=ExportSettings(progress=steps.append))
    assert steps == []


RECIPE = 'name = "n"\narch = "tests.networks:tiny"\n[input]\nsize = [32, 48]\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name = ", "is not a valid recipe: "),
        (b"\xff\xfe", "is not a valid recipe: "),
        ('name = "n"\n[input]\nsize = [8, 8]\n', "missing required field `arch`"),
        ("labls = []\n" + RECIPE, "unknown field `labls`"),
        (RECIPE.replace("[32, 48]", "32"), "Expected `array`, got `int` - at `$.input.size`"),
        (RECIPE.replace("32", "0"), "Expected `int` >= 1 - at `$.input.size[0]`"),
        ('precision = "int4"\n' + RECIPE, "Invalid enum value 'int4' - at `$.precision`"),
        (RECIPE + "[tolerance.fp32]\nlogits = -1\n", "Expected `float` >= 0.0"),
    ],
)
def test_recipes_that_cannot_be_read(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(OptionError) as raised:
        read_recipe(path)
    assert str(raised.value).startswith(f"{path} ")
    assert message in str(raised.value)


def test_recipes_that_cannot_be_followed(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    with pytest.raises(OptionError, match=r"recipe\.toml cannot be read: No such file or direct"):
        read_recipe(path)
    path.write_text(RECIPE)
    recipe = read_recipe(path)
    with pytest.raises(SourceError, match=r"^the recipe n has no trained weights; use --random-w"):
        recipe_model(recipe, tmp_path)
    path.write_text('weights = "none.pt"\nlabels = "none.txt"\n' + RECIPE)
    recipe = read_recipe(path)
    with pytest.raises(SourceError, match=r"none\.pt does not exist$"):
        recipe_model(recipe, tmp_path)
    with pytest.raises(OptionError, match=r"none\.txt cannot be read as labels: "):
        recipe_settings(recipe, tmp_path)
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(OptionError, match=r"none\.txt holds no labels; give one a line$"):
        recipe_settings(recipe, tmp_path)
    (tmp_path / "none.txt").write_text("cat\r\n\r\ndog", "utf-8-sig")
    assert recipe_settings(recipe, tmp_path).labels == ("cat", "dog"), "as Windows saves it"
    path.write_text('labels = "math:pi"\n' + RECIPE)
    with pytest.raises(OptionError, match=r'^labels "math:pi" do not exist$'):
        recipe_settings(read_recipe(path), tmp_path)
    torch.export.save(trace_model(tiny(), (3, *SIZE)), tmp_path / "whole.pt2")
    path.write_text('weights = "whole.pt2"\n' + RECIPE)
    with pytest.raises(SourceError, match=r'^weights "whole\.pt2" are a whole program'):
        recipe_model(read_recipe(path), tmp_path)
    path.write_text(RECIPE.replace(":tiny", ":tiny(channels=1)"))
    with pytest.raises(SourceError, match=r"does not run on images of \[3, 32, 48\]: Given groups"):
        random_model(read_recipe(path))


def test_recipes_say_what_is_exported(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("ant\n\n bee \n")
    path = tmp_path / "recipe.toml"
    path.write_text('labels = "names.txt"\n' + RECIPE + "mean = [0, 0.5, 1]\n")
    settings = recipe_settings(read_recipe(path), tmp_path)
    assert (settings.labels, settings.mean) == (("ant", "bee"), (0.0, 0.5, 1.0))
    assert (settings.name, settings.source) == ("n", "tests.networks:tiny")
    digits = read_recipe(RECIPES / "digits.toml")
    assert recipe_settings(digits, RECIPES).labels == tuple("0123456789")
    assert all(read_recipe(file).name == file.stem for file in RECIPES.glob("*.toml"))


def test_a_recipes_cover_follows_the_input_size(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE + "cover = [40, 50]\n")
    recipe = read_recipe(path)
    assert recipe.input.size == (32, 48)
    assert recipe_settings(recipe, tmp_path).cover == (40, 50)
    assert recipe_settings(recipe, tmp_path, (64, 48)).cover == (80, 50)
    assert recipe_settings(recipe, tmp_path, (16, 24)).cover == (20, 25)


def test_random_weights_are_the_same_every_time(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace("tiny", "TinyNet"))
    random = torch.get_rng_state()
    one, other = (random_model(read_recipe(path)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), random)
    assert isinstance(one, TinyNet)
    assert not one.training
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert one.norm1.running_mean is not None
    assert one.norm1.running_mean.abs().max() > 0.01


def test_the_manifest_is_plain_json(digits_bundle: Path) -> None:
    """And names every file."""
    content = json.loads((digits_bundle / "manifest.json").read_text())
    listed = {path.name for path in digits_bundle.iterdir()} - {"manifest.json"}
    assert set(content["files"]) == listed
    assert content["random_weights"] is False


@pytest.mark.slow
def test_a_traced_script_is_exported_like_its_model(tmp_path: Path) -> None:
    """TorchScript has its own convolution and no module names; batch normalisation is folded."""
    model = tiny()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, torch.zeros(1, 3, *SIZE)), tmp_path / "net.pt")  # type: ignore[no-untyped-call]
    script = load_model(tmp_path / "net.pt")
    bundle = export(script, tmp_path / "script", SIZE)
    assert [layer.channels for layer in bundle.manifest.layers] == [6, 8]
    images = noise(2, 3, *SIZE)
    with ccam.load(bundle) as one, ccam.load(export(model, tmp_path / "own", SIZE)) as other:
        got, expected = one.explain(images), other.explain(images)
    np.testing.assert_allclose(got.logits, expected.logits, atol=1e-5)
    np.testing.assert_allclose(got.saliency, expected.saliency, atol=1e-4)

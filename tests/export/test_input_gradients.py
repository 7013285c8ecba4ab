"""Graphs of the image's gradient against autograd, plain and guided."""

from __future__ import annotations

import dataclasses
import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from msgspec import UNSET
from torch import nn

import ccam_deploy as ccam
from ccam_deploy.bundle.consistency import require_consistency
from ccam_deploy.bundle.folder import read_bundle
from ccam_deploy.bundle.manifest import GRAPHS, GraphPrecision
from ccam_deploy.engines import load_networks, open_networks
from ccam_deploy.engines.onnxruntime import OnnxRuntimeEngine
from ccam_deploy.engines.tensorrt.build import BuildSettings, build
from ccam_deploy.engines.tensorrt.library import load_library
from ccam_deploy.errors import IntegrityError, ManifestError, OptionError
from ccam_deploy.export import ExportSettings, autodiff, excitation, export
from ccam_deploy.export.architecture import import_module
from ccam_deploy.export.graphs import convert_graphs, input_gradient_graph
from ccam_deploy.export.layers import find_layers
from ccam_deploy.export.program import build_program, trace_model
from ccam_deploy.export.recipe import random_model, read_recipe
from ccam_deploy.fidelity.comparison import relative_error
from ccam_deploy.fidelity.verification import verify_bundle
from tests.command import success
from tests.helpers import RECIPES, example_pictures, noise
from tests.networks import digits_model, tiny
from tests.reference import input_gradient_by_hooks
from tests.sweeps import nightly_but

OPTIONAL = {"input_gradient", "guided_gradient", "excitation"}


@pytest.mark.parametrize("guided", [False, True])
def test_gradients_of_the_trained_example(differentiable: ccam.Explainer, guided: bool) -> None:
    """Relative error at most 1e-4 for each image; see test_gradients for the one that may miss."""
    images, _ = differentiable.preprocess(example_pictures())
    output_gradient = noise(len(images), 10)
    got = differentiable.networks.input_gradient(images, output_gradient, guided)
    want = input_gradient_by_hooks(
        digits_model(), torch.from_numpy(images), torch.from_numpy(output_gradient), guided
    ).numpy()
    errors = [relative_error(g, w) for g, w in zip(got, want, strict=True)]
    assert got.dtype == np.float32
    assert np.count_nonzero(np.array(errors) > 1e-4) <= 1
    assert np.median(errors) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("guided", nightly_but([True], [False, True]))
def test_graphs_are_exact_in_double_precision(guided: bool) -> None:
    built = build_program(trace_model(digits_model(), (3, 96, 96)))
    graph = autodiff.differentiate_input(built, torch.float64, guided)
    images = torch.from_numpy(noise(4, 3, 96, 96)).double()
    output_gradient = torch.from_numpy(noise(4, 10, seed=1)).double()
    (got,) = graph(images, output_gradient)
    want = input_gradient_by_hooks(digits_model().double(), images, output_gradient, guided)
    assert float((got - want).norm() / want.norm()) <= 1e-6


def test_guided_differs_where_gradients_are_negative(differentiable: ccam.Explainer) -> None:
    """A graph that forgot to guide would pass every comparison with itself."""
    images, _ = differentiable.preprocess(example_pictures())
    output_gradient = np.eye(10, dtype=np.float32)[:8]
    plain, guided = (
        differentiable.networks.input_gradient(images, output_gradient, choice)
        for choice in (False, True)
    )
    assert relative_error(guided, plain) > 0.5


def test_half_precision(gradients_bundle: Path) -> None:
    """The gradient scale is taken out again."""
    images, found = noise(2, 3, 96, 96), []
    for precision in ("fp32", "fp16"):
        with ccam.load(gradients_bundle, precision=precision) as explainer:
            output_gradient = np.eye(10, dtype=np.float32)[:2]
            found.append(explainer.networks.input_gradient(images, output_gradient))
    assert relative_error(found[1], found[0]) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(2), pytest.param(nn.MaxPool2d(3, 2, 1), marks=pytest.mark.nightly)],
    ids=["2", "3-2-1"],
)
def test_max_pooling_in_half_precision(pool: nn.Module, tmp_path: Path) -> None:
    """Where an engine computes in a wider type, pooled values still find their place."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), pool, nn.Flatten(), nn.LazyLinear(5)]
    model = nn.Sequential(*body)
    model(torch.zeros(1, 3, 16, 16))
    built = build_program(trace_model(model, (3, 16, 16)))
    found = find_layers(built, ["0"])
    converted = convert_graphs(built, found, torch.float16, with_gradients=True)
    paths = {name: tmp_path / f"{name}.onnx" for name, _ in converted.items()}
    for name, graph in converted.items():
        ir.save(graph, paths[name])
    images, output_gradient = noise(3, 3, 16, 16), noise(3, 5, seed=1)
    networks = load_networks(paths, 1.0, "onnxruntime-cpu")
    try:
        got = networks.input_gradient(images, output_gradient)
    finally:
        networks.close()
    want = input_gradient_by_hooks(
        model, torch.from_numpy(images), torch.from_numpy(output_gradient)
    )
    assert relative_error(got, want.numpy()) < 0.1


def test_the_manifest_says_what_is_there(gradients_bundle: Path, digits_bundle: Path) -> None:
    for folder, extra in ((gradients_bundle, OPTIONAL), (digits_bundle, set())):
        for precision in read_bundle(folder).manifest.precisions.values():
            assert set(precision.graphs) == {*GRAPHS, *extra}
            assert OPTIONAL.intersection(precision.tolerance) == extra
            for name in OPTIONAL:
                assert (getattr(precision.fidelity, name) is not UNSET) == (name in extra)
    shown = success("info", gradients_bundle).stdout
    assert "gradient of the image" in shown
    assert "  guided" in shown
    assert "gradient of the image" not in success("info", digits_bundle).stdout


def test_a_graph_without_its_fidelity(gradients_bundle: Path) -> None:
    manifest = read_bundle(gradients_bundle).manifest
    whole = manifest.precisions["fp32"]
    report = dataclasses.replace(whole.fidelity, guided_gradient=UNSET)
    changed = dataclasses.replace(whole, fidelity=report)
    broken = dataclasses.replace(manifest, precisions={"fp32": changed})
    with pytest.raises(ManifestError, match="differ in guided_gradient"):
        require_consistency(Path("manifest.json"), broken)


@pytest.mark.slow
def test_a_network_without_relu(tmp_path: Path) -> None:
    """It gets no guided graph, and a bundle without either says how to get one."""
    model = tiny()
    model.relu1, model.relu2 = nn.Tanh(), nn.SiLU()  # type: ignore[assignment]
    images, one_hot = noise(2, 3, 32, 48), np.eye(5, dtype=np.float32)[:2]
    settings = ExportSettings(gradients=True)
    bundle = export(model, tmp_path / "smooth", (32, 48), ["conv2"], "fp32", settings)
    assert set(bundle.precision("fp32").graphs) == {*GRAPHS, "input_gradient"}
    with ccam.load(bundle) as explainer:
        got = explainer.networks.input_gradient(images, one_hot)
        want = input_gradient_by_hooks(model, torch.from_numpy(images), torch.from_numpy(one_hot))
        np.testing.assert_allclose(got, want.numpy(), atol=1e-6)
        with pytest.raises(OptionError, match="guided_gradient graph, for its network has no ReLU"):
            explainer.networks.input_gradient(images, one_hot, guided=True)


def test_a_bundle_without_the_graphs(tiny_bundle: Path) -> None:
    with (
        ccam.load(tiny_bundle) as explainer,
        pytest.raises(OptionError, match="no input_gradient graph; export it with --gradients"),
    ):
        explainer.networks.input_gradient(noise(1, 3, 32, 48), noise(1, 5))


def test_verify_finds_another_gradient(gradients_bundle: Path, tmp_path: Path) -> None:
    """The recorded values of the image's gradient are compared too."""
    copy = tmp_path / "copy"
    shutil.copytree(gradients_bundle, copy)
    bundle = read_bundle(copy)
    networks = open_networks(bundle, "onnxruntime-cpu", "fp32")
    try:
        report, broken = verify_bundle(bundle, networks, "fp32")
        assert not broken
        assert isinstance(report.input_gradient, float)
        assert report.input_gradient <= 1e-4
        path = bundle.path(bundle.precision("fp32").reference)
        with np.load(path) as values:
            changed = dict(values)
        changed["guided_gradient"] = changed["guided_gradient"][:, :, ::-1]
        np.savez_compressed(path, **changed)
        _, broken = verify_bundle(bundle, networks, "fp32")
    finally:
        networks.close()
    assert [line.split()[0] for line in broken] == ["guided_gradient"]


def test_verify_names_a_missing_record(gradients_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(gradients_bundle, copy)
    bundle = read_bundle(copy)
    path = bundle.path(bundle.precision("fp32").reference)
    with np.load(path) as values:
        np.savez_compressed(path, **{k: v for k, v in values.items() if k != "input_gradient"})
    networks = open_networks(bundle, "onnxruntime-cpu", "fp32")
    try:
        with pytest.raises(IntegrityError, match="holds no input_gradient"):
            verify_bundle(bundle, networks, "fp32")
    finally:
        networks.close()


@pytest.mark.slow
def test_the_command_line_writes_the_graphs(tmp_path: Path) -> None:
    weights = tmp_path / "tiny.pt"
    torch.save(tiny().state_dict(), weights)
    network = ("--arch", "tests.networks:tiny", "--input-size", "32x48")
    options = ("--gradients", "--json", "--output", tmp_path / "tiny")
    result = success("export", weights, *network, *options)
    graphs = json.loads(result.stdout)["manifest"]["precisions"]["fp32"]["graphs"]
    assert set(graphs) > OPTIONAL


@pytest.mark.parametrize("precision", nightly_but(["fp16"], ["fp32", "fp16"]))
def test_tensorrt_builds_the_graphs(
    gradients_bundle: Path, tmp_path: Path, precision: GraphPrecision
) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = read_bundle(shutil.copytree(gradients_bundle, tmp_path / "copy"))
    settings = BuildSettings(max_batch=2, devices=("8.9",))
    built = build(bundle, load_library("tensorrt-rtx"), precision, settings)
    assert {plan.graph for plan in built.plans} == {*GRAPHS, *OPTIONAL}


@pytest.mark.nightly
def test_resnet18(resnet18_bundle: Path, tmp_path: Path) -> None:
    """Overlapping max-pooling: both precisions agree with PyTorch, and TensorRT builds them.

    In double precision the graphs are exact to 1e-7; in float32 some ReLUs round to the other side,
    so the bound is that of a trained network's export.
    """
    bundle = read_bundle(shutil.copytree(resnet18_bundle, tmp_path / "resnet18"))
    report = bundle.precision("fp32").fidelity
    assert max(float(report.input_gradient), float(report.guided_gradient)) <= 1e-2  # type: ignore[arg-type]
    pytest.importorskip("tensorrt_rtx")
    library = load_library("tensorrt-rtx")
    for precision in bundle.manifest.precisions:
        built = build(bundle, library, precision, BuildSettings(max_batch=2, devices=("8.9",)))
        assert {plan.graph for plan in built.plans} == {*GRAPHS, *OPTIONAL, "head"}
        bundle = built.bundle


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "without_rule"),
    [
        ("convnext_tiny", "layer_norm"),
        ("densenet121", ""),
        ("efficientnet_b0", "silu"),
        ("mobilenet_v3_large", "hardsigmoid"),
        ("regnet_y_400mf", "sigmoid"),
        ("vgg19", ""),
    ],
)
def test_other_recipes(name: str, without_rule: str, tmp_path: Path) -> None:
    """Which have the excitation graph; where others' gradient goes through gates and the like, it
    is that of autograd, guided where there is a ReLU. At a small size, with random weights.
    """
    import_module("torchvision.models")
    model = random_model(read_recipe(RECIPES / f"{name}.toml"))
    built = build_program(trace_model(model, (3, 64, 64)))
    reason = excitation.why_not(built, find_layers(built))
    assert reason.startswith(f"{without_rule} in layer" if without_rule else "")
    assert bool(reason) == bool(without_rule)
    if not without_rule:
        return
    guided = autodiff.has_relu(built)
    graph = input_gradient_graph(built, torch.float32, guided)
    ir.save(graph, tmp_path / "graph.onnx", external_data="graph.data")
    images, one_hot = noise(2, 3, 64, 64), np.eye(1000, dtype=np.float32)[[3, 7]]
    with closing(OnnxRuntimeEngine(tmp_path / "graph.onnx", "cpu")) as engine:
        got = engine.run({"images": images, "output_gradient": one_hot})["input_gradient"]
    want = input_gradient_by_hooks(
        model.eval(), torch.from_numpy(images), torch.from_numpy(one_hot), guided
    )
    assert relative_error(got, want.numpy()) <= 1e-2

"""Networks that went through an ONNX file are the networks in PyTorch, maps included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

import ccam_deploy as ccam
from ccam_deploy.errors import SourceError
from ccam_deploy.export.architecture import build_model
from ccam_deploy.export.from_onnx.agreement import require_agreement
from ccam_deploy.export.from_onnx.call import without_batch
from ccam_deploy.export.from_onnx.network import OnnxNetwork
from ccam_deploy.export.layers import find_layers
from ccam_deploy.export.program import Program, build_program, module_of, trace_model
from ccam_deploy.export.sources import load_model
from ccam_deploy.latency import plain_pytorch
from tests.command import failure, success
from tests.export.onnx_files import network, run, write_graph, write_network
from tests.helpers import noise
from tests.networks import tiny
from tests.sweeps import nightly_but

SIZE = (32, 48)
EXPORTERS = pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
FILES = pytest.mark.parametrize(
    ("batch", "dynamo"),
    [
        pytest.param(0, False, id="0-torchscript"),
        pytest.param(1, False, id="1-torchscript", marks=pytest.mark.slow),
        pytest.param(1, True, id="1-dynamo", marks=pytest.mark.slow),
        pytest.param(2, False, id="2-torchscript", marks=pytest.mark.nightly),
        pytest.param(0, True, id="0-dynamo", marks=pytest.mark.nightly),
        pytest.param(2, True, id="2-dynamo", marks=pytest.mark.nightly),
    ],
)
"""The batch that is built into a file, 0 where it is dynamic, and which exporter wrote it."""


class Attention(nn.Module):
    """images [B, 3, H, W] -> logits [B, 5], by tokens with a class token and heads that are views.

    A fixed batch is built into the shapes of its file in many places.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.patches = nn.Conv2d(8, 12, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.mixed = nn.Linear(12, 36)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(self.stem(x).relu())
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1)
        count, length, _ = tokens.shape
        mixed = self.mixed(tokens).reshape(count, length, 3, 3, 4).permute(2, 0, 3, 1, 4)
        query, key, value = (part.reshape(count * 3, length, 4) for part in mixed)
        shares = (query @ key.transpose(1, 2)).softmax(-1)
        out = (shares @ value).reshape(count, 3, length, 4).transpose(1, 2).reshape(tokens.shape)
        return self.head((tokens + out)[:, 0])  # type: ignore[no-any-return]


class NormOfChannels(nn.LayerNorm):
    """images [B, C, H, W], each place normalised over its channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def assert_same_network(path: Path, model: nn.Module, size: tuple[int, int]) -> Program:
    """Its trace gives what the model gives for any batch, and agrees with its file."""
    loaded = network(path)
    program = build_program(loaded.trace(size))
    images = noise(3, 3, *size)
    for batch in (images, images[:1]):
        with torch.no_grad():
            (got,) = program.graph(torch.from_numpy(batch))
            expected = model(torch.from_numpy(batch))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert require_agreement(loaded.file, images, program) < 1e-5
    return program


@pytest.mark.slow
@FILES
def test_a_network_is_the_same_in_its_file(tmp_path: Path, dynamo: bool, batch: int) -> None:
    """With its modules' names; a fixed batch becomes dynamic."""
    path = write_network(tmp_path / "tiny.onnx", tiny(), SIZE, dynamo, batch)
    program = assert_same_network(path, tiny(), SIZE)
    assert [layer.name for layer in find_layers(program)] == ["relu1", "relu2"]
    unfolded = build_program(network(path).trace(SIZE), fold=False)
    called = [node for node in unfolded.graph.graph.nodes if node.op == "call_function"]
    modules = [module_of(node) for node in called if "conv" in str(node.target)]
    # the newer exporter has folded the normalisation, and names its result so
    assert modules == ["norm1" if dynamo else "conv1", "conv2"]


@pytest.mark.slow
@FILES
def test_views_and_tokens_of_a_fixed_batch(tmp_path: Path, dynamo: bool, batch: int) -> None:
    model = Attention().eval()
    path = write_network(tmp_path / "attention.onnx", model, SIZE, dynamo, batch)
    assert_same_network(path, model, SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_a_view_written_as_numbers(tmp_path: Path, batch: int) -> None:
    """The newer exporter gathers pooled means out of a flat row that holds the whole batch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        NormOfChannels(8),
        nn.AdaptiveAvgPool2d(1),
        NormOfChannels(8),
        nn.Flatten(1),
        nn.Linear(8, 5),
    ).eval()
    path = write_network(tmp_path / "view.onnx", model, SIZE, True, batch)
    assert "Gather" in [node.op_type for node in onnx.load(path).graph.node]
    assert_same_network(path, model, SIZE)


@pytest.mark.parametrize(
    "places", [[[1, 0], [4, 3]], [[0, 1], [2, 3]], [[0, 3], [3, 6]]], ids=["same", "other", "past"]
)
def test_numbers_into_a_flat_row(tmp_path: Path, places: list[list[int]]) -> None:
    """Those that pick the same of two images hold for any number of them."""
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("Reshape", ["means", "flat"], ["row"]),
        helper.make_node("Gather", ["row", "places"], ["out"]),
    ]
    given = {"flat": np.array([-1]), "places": np.array(places)}
    path = write_graph(tmp_path / "row.onnx", nodes, given, (2, 3, 8, 8), opset=13)
    if places[0] != [1, 0]:
        with pytest.raises(SourceError, match="Gather cannot be exported: it picks from a batch"):
            network(path).trace((8, 8))
        return
    images = noise(2, 3, 8, 8)
    means = network(path).trace((8, 8)).module()(torch.from_numpy(images))
    np.testing.assert_allclose(means, run(path, images), atol=1e-6)
    np.testing.assert_allclose(means, images.mean((2, 3))[:, [1, 0]], atol=1e-6)


def test_a_file_that_mixes_its_images_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["means"], axes=[0, 2, 3]),
        helper.make_node("Flatten", ["means"], ["out"]),
    ]
    path = write_graph(tmp_path / "mean.onnx", nodes, {}, (2, 3, 8, 8), opset=13)
    with pytest.raises(
        SourceError, match=r"gives logits \[1, 3\] for any number of images; export"
    ):
        network(path).trace((8, 8))


@pytest.mark.parametrize(
    ("shape", "target", "batch", "expected"),
    [
        (("2n", 6, 5), (1, 60), 1, (-1, 60)),
        (("n", 6, 5), (1, -1), 1, (-1, 30)),
        (("n", 6, 5), (4, 30), 4, (-1, 30)),
        (("n", 6, 5), (-1, 5), 4, (-1, 5)),
        (("n", 6, 5), (1, 4, 6, 5), 4, (1, -1, 6, 5)),
        ((6, "n", 10), (6, 3, 10), 1, (6, -1, 10)),
        ((6, 10), (60,), 1, (60,)),
        ((17, "n", 32), (17, 32), 1, (-1, 32)),
        ((17, "n", 32), (34, 32), 2, (-1, 32)),
        (("17n", 32), (17, 1, 32), 1, (17, -1, 32)),
        (("17n", 32), (17, 2, 32), 2, (17, -1, 32)),
    ],
)
def test_a_shape_is_freed_from_the_batch(
    shape: tuple[int | str, ...], target: tuple[int, ...], batch: int, expected: tuple[int, ...]
) -> None:
    found = []

    class Reader(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes = {f"{k or ''}n": (k or 1) * x.shape[0] for k in (0, 2, 17)}
            found.append(without_batch([sizes.get(s, s) for s in shape], target, batch))  # type: ignore[arg-type]
            return x.mean((2, 3))

    trace_model(Reader(), (3, 4, 4))
    assert tuple(found[-1]) == expected


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", nightly_but([False], [False, True]))
def test_maps_are_those_of_the_network_in_pytorch(
    tmp_path: Path, tiny_bundle: Path, dynamo: bool
) -> None:
    """Collection-CAM and Grad-CAM, to 1e-4, with equal partitions."""
    path = write_network(tmp_path / "tiny.onnx", tiny(), SIZE, dynamo)
    success("export", path, "--output", tmp_path / "bundle", "--input-size", "32x48")
    images = noise(4, 3, *SIZE)
    for method in ("collection-cam", "grad-cam"):
        results = []
        for folder in (tiny_bundle, tmp_path / "bundle"):
            with ccam.load(folder) as explainer:
                results.append(explainer.explain(images, 2, method=method))
        theirs, ours = results
        np.testing.assert_allclose(ours.raw_saliency, theirs.raw_saliency, atol=1e-4)
        np.testing.assert_allclose(ours.saliency, theirs.saliency, atol=1e-4)
        for layer, other in zip(ours.layers, theirs.layers, strict=True):
            assert layer.name == other.name
            assert layer.labels.tolist() == other.labels.tolist()


@pytest.mark.slow
def test_the_command_says_what_it_compares(tmp_path: Path) -> None:
    path = write_network(tmp_path / "tiny.onnx", tiny(), SIZE, False, 1)
    result = success("export", path, "--output", tmp_path / "bundle")
    assert "comparing with tiny.onnx in ONNX Runtime" in result.stderr.splitlines()
    with ccam.load(tmp_path / "bundle") as explainer:
        manifest = explainer.bundle.manifest
    assert (manifest.source, manifest.input) == ("tiny.onnx", (3, *SIZE))
    refused = ("export", path, "--output", tmp_path / "other")
    assert failure(*refused, "--input-size", "64x64") == (
        "input_size is (64, 64); the program takes (32, 48)"
    )
    assert "--arch goes with a file of weights" in failure(*refused, "--arch", "a:b")


@pytest.mark.slow
def test_plain_pytorch_runs_it(tmp_path: Path) -> None:
    path = write_network(tmp_path / "tiny.onnx", tiny(), SIZE, False)
    peer = plain_pytorch.of_model(load_model(path), ["relu2"], (3, *SIZE))
    images = noise(2, 3, *SIZE)
    with torch.no_grad():
        expected = tiny()(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(peer.logits(images), expected, atol=1e-6)


TORCHVISION = (
    "resnet18",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "densenet121",
    "efficientnet_b0",
    "regnet_y_400mf",
    "mnasnet0_5",
    "convnext_tiny",
    "googlenet(init_weights=False)",
)


@pytest.mark.nightly
@EXPORTERS
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("name", TORCHVISION)
def test_architectures_are_the_same_in_their_files(
    tmp_path: Path, name: str, dynamo: bool, batch: int
) -> None:
    """Also the target layers, whose names the file keeps."""
    torch.manual_seed(0)
    model = build_model(f"torchvision.models:{name}").eval()
    path = write_network(tmp_path / "model.onnx", model, (64, 64), dynamo, batch)
    program = assert_same_network(path, model, (64, 64))
    original = find_layers(build_program(trace_model(model, (3, 64, 64))))
    found = find_layers(program)
    assert [layer.shape for layer in found] == [layer.shape for layer in original]
    assert isinstance(load_model(path), OnnxNetwork)

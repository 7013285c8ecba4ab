"""What the GPU's benchmark times: the right passes, on the right layers, of differing images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ccam_deploy as ccam
from bench import bench_kernels
from bench.gpu import explain, floor
from bench.gpu.pieces import PRECISIONS, Piece, score_pieces
from ccam_deploy.latency.cases import make_cases
from tests.helpers import example_pictures


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(9)
    ).eval()


def test_floor_differentiates_the_layers() -> None:
    """The last layer's gradient is the row of the head's weights that belongs to the class."""
    torch.manual_seed(0)
    model = small()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        features = model[:4](images)
    first, last = floor.Passes(model, ["1", "3"]).gradients(images)
    weights = dict(model.named_parameters())["5.weight"]
    head = weights[floor._TARGET].reshape(features.shape[1:])
    assert first.shape == (2, 4, 6, 6)
    torch.testing.assert_close(last, head.expand_as(last))
    assert not images.requires_grad


def test_floor_makes_as_many_forwards_as_there_are_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    rows: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    passes = floor.Passes(model, ["1"])
    images, masked = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 8, 8)
    monkeypatch.setattr(floor, "BATCH_SIZE", 3)
    passes.at_once(images, masked)
    assert rows == [2, 3, 2]
    rows.clear()
    passes.one_by_one(images, masked)
    assert rows == [1] * 7


@pytest.mark.slow
@pytest.mark.parametrize("network", PRECISIONS)
def test_layers_are_those_of_the_kernels(network: str) -> None:
    with torch.device("meta"):
        model = floor.random_network(network)
        assert not any(getattr(module, "inplace", False) for module in model.modules())
        gradients = floor.Passes(model, floor.LAYERS[network]).gradients(
            torch.zeros(1, 3, 224, 224)
        )
    shapes = tuple(tuple(gradient.shape[1:]) for gradient in gradients)
    assert shapes == bench_kernels.SHAPES[network]


def test_pytorch_without_a_gpu_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    piece = Piece(kind="floor", network="resnet18", batch=1, precision="fp16", masks=2)
    with pytest.raises(RuntimeError, match="PyTorch cannot use a GPU here"):
        floor.measure(piece, None)


@pytest.mark.slow
def test_explanations_are_timed_and_their_masks_counted(digits: ccam.Explainer) -> None:
    figures = explain.measure(digits, 2)
    assert figures["ms"]["calls"] >= len(explain.inputs(digits, 2))
    assert figures["ms"]["minimum"] <= figures["ms"]["median"] <= figures["ms"]["maximum"]
    assert 0 <= figures["host_share"] < 0.5
    assert {"backbone", "classifier", "between"} <= set(explain.stages_of_one(digits))
    assert figures["host_ms"] < figures["ms"]["maximum"]
    (case,) = make_cases(digits, example_pictures()[:2], 2)
    assert explain.count_masks(digits.explain(case.images)) == len(case.masks)


@pytest.mark.slow
def test_score_cam_is_timed_beside_its_forwards(
    digits_bundle: Path, digits: ccam.Explainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "require_gpu", lambda explainer: None)
    explainers = explain.Explainers(digits_bundle, "onnxruntime-cpu")
    figures = explainers.measure(score_pieces("score-cam", "resnet18")[0])
    explainers.close()
    (images, *_) = explain.inputs(digits, 1)
    features = digits.networks.backbone(images).features[-1]
    assert figures["masks"] == np.count_nonzero(np.ptp(features, axis=(2, 3)))
    assert 0 < figures["forwards_ms"] < figures["ms"]["median"]
    assert figures["overhead"] == pytest.approx(
        figures["ms"]["median"] / figures["forwards_ms"], abs=1e-3
    )


def test_torchcam_explains_one_class() -> None:
    pytest.importorskip("torchcam")
    torch.manual_seed(0)
    model, images = small(), torch.randn(1, 3, 8, 8)
    model(images)
    found = floor.torchcam_score_cam(model, "3", images)()
    assert found.shape == model[:4](images).shape[2:]
    assert 0 == found.min() < found.max()


def test_torchcam_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcam.methods", None)
    with pytest.raises(RuntimeError, match="torchcam is not installed"):
        floor.torchcam_score_cam(small(), "3", torch.zeros(1, 3, 8, 8))


def test_every_precision_is_prepared_for_one_image_and_then_for_all(
    digits_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is measured, and never twice."""
    log: list[object] = []
    monkeypatch.setattr(explain, "require_gpu", lambda explainer: None)

    def measure(explainer: ccam.Explainer, batch: int) -> dict[str, Any]:
        log.append(batch)
        return {}

    monkeypatch.setattr(explain, "measure", measure)
    monkeypatch.setattr(ccam.Explainer, "warm_up", lambda self, batch: log.append(f"for {batch}"))
    explainers = explain.Explainers(digits_bundle, "onnxruntime-cpu")
    for batch in (1, 8, 32):
        piece = Piece(kind="explain", network="resnet18", batch=batch, precision="fp32")
        figures = explainers.measure(piece)
    explainers.close()
    assert log == ["for 1", 1, "for 32", 8, 32]
    assert figures["warm_up_ms"] >= 0
    assert figures["backend"] == "onnxruntime-cpu"


def test_inputs_differ(digits: ccam.Explainer) -> None:
    batches = explain.inputs(digits, 2)
    rows = np.concatenate(batches)
    assert batches[0].shape == (2, *digits.bundle.manifest.input)
    assert len(np.unique(rows.reshape(len(rows), -1), axis=0)) == len(rows)


def test_a_cpu_is_no_gpu(digits: ccam.Explainer) -> None:
    with pytest.raises(ccam.BackendError, match="no backend for a GPU is installed"):
        explain.require_gpu(digits)

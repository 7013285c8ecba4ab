"""The peer of the benchmarks gives the paper's maps too, so that like is compared with like."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ccam_deploy as ccam
from ccam_deploy.errors import LayerError
from ccam_deploy.export.architecture import Model
from ccam_deploy.export.layers import find_layers
from ccam_deploy.export.program import build_program, trace_model
from ccam_deploy.export.sources import load_model
from ccam_deploy.export.torchscript import ScriptedModel
from ccam_deploy.latency import plain_pytorch
from tests.helpers import DIGITS_LAYERS, example_pictures, noise
from tests.networks import Ended, digits_model, tiny
from tests.sweeps import nightly_but

MODELS = ("module", "program", "script")


def digits_as(form: str, folder: Path) -> Model:
    """The example classifier, as each form of model file gives it."""
    if form == "program":
        return trace_model(digits_model(), (3, 96, 96))
    if form == "script":
        example = torch.zeros(2, 3, 96, 96)
        script = torch.jit.trace(digits_model(), example)  # type: ignore[no-untyped-call]
        torch.jit.save(script, folder / "script.pt")
        return load_model(folder / "script.pt")
    return digits_model()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", MODELS)
@pytest.mark.parametrize("index", nightly_but([0], [0, 3]))
def test_peer_agrees_with_the_explainer(
    digits: ccam.Explainer, index: int, form: str, tmp_path: Path
) -> None:
    images, _ = digits.preprocess([example_pictures()[index]])
    result = digits.explain(images)
    shape = digits.bundle.manifest.input
    model = digits_as(form, tmp_path)
    peer = plain_pytorch.of_model(
        model, DIGITS_LAYERS if form != "script" else layers_of(model), shape
    )
    saliency, count = peer.explain(torch.from_numpy(images[0].copy()))
    different = np.abs(saliency.numpy() - result.raw_saliency[0]) > 1e-4
    assert np.count_nonzero(different) <= 9  # pixels whose mask value lies on the quantile
    assert count == np.count_nonzero(result.weights[0])


def layers_of(script: Model) -> list[str]:
    """A script has no names of modules: its layers are nodes of its trace."""
    assert isinstance(script, ScriptedModel)
    program = build_program(trace_model(script, (3, 96, 96)))
    return [layer.name for layer in find_layers(program)]


@pytest.mark.slow
def test_logits_as_an_export_finds_them() -> None:
    """One probability is the two logits that the bundle has."""
    model = Ended(torch.sigmoid, 1).eval()
    peer = plain_pytorch.of_model(model, ["net.relu2"], (3, 32, 48), activation="sigmoid")
    images = noise(2, 3, 32, 48)
    with torch.no_grad():
        z = model.net(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(peer.logits(images), np.concatenate([-z, z], 1), atol=1e-6)


@pytest.mark.slow
def test_another_model_is_refused() -> None:
    with pytest.raises(LayerError, match='layer "layer1" is not in the model'):
        plain_pytorch.of_model(tiny(), DIGITS_LAYERS, (3, 32, 48))


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_switched_in_convolutions_and_in_matrix_products(allowed: bool) -> None:
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        plain_pytorch.use_tf32(allowed)
        assert [backend.allow_tf32 for backend in backends] == [allowed, allowed]
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def test_a_driver_that_pytorch_cannot_use_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_available() -> bool:
        warnings.warn("CUDA initialization: the driver is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert plain_pytorch.best_device() == "cpu"

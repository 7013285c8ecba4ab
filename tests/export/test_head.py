"""The head: the graph from the last target layer to the logits, written where it is wanted."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import UNSET

import ccam_deploy as ccam
from ccam_deploy.bundle.folder import read_bundle, write_manifest
from ccam_deploy.engines import Networks, open_networks
from ccam_deploy.errors import (
    IntegrityError,
    LayerError,
    ManifestError,
    OptionError,
    ToleranceError,
)
from ccam_deploy.export import ExportSettings, export
from ccam_deploy.export.layers import find_layers
from ccam_deploy.export.program import build_program, trace_model
from ccam_deploy.export.reference import TorchClassifier
from ccam_deploy.fidelity.verification import verify_bundle
from tests.command import failure, success
from tests.helpers import noise
from tests.networks import Detached, tiny


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-5), ("fp16", 1e-2)])
def test_head_is_the_end_of_the_classifier(
    headed_bundle: Path, precision: str, error: float
) -> None:
    """On features of images, and on any others, as many as one likes."""
    traced = build_program(trace_model(tiny(), (3, 32, 48)))
    peer = TorchClassifier(traced, find_layers(traced))
    with ccam.load(headed_bundle, precision=precision) as explainer:
        activations = explainer.networks.backbone(noise(3, 3, 32, 48))
        own = explainer.networks.head_logits(activations.features[-1])
        np.testing.assert_allclose(own, activations.logits, atol=error)
        for count in (1, 7):
            features = noise(count, 8, 8, 12)
            got = explainer.networks.head_logits(features)
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, peer.head_logits(features), atol=error)


@pytest.mark.slow
def test_head_is_listed_and_shares_the_weights(headed_bundle: Path, tiny_bundle: Path) -> None:
    with ccam.load(headed_bundle) as with_head, ccam.load(tiny_bundle) as without:
        files = with_head.bundle.manifest.precisions["fp32"].graphs
        assert files["head"] == "head.onnx"
        assert "head.onnx" in with_head.bundle.manifest.files
        assert "head" not in without.bundle.manifest.precisions["fp32"].graphs
        with pytest.raises(OptionError, match="has no head graph; export it with --head"):
            without.networks.head_logits(noise(1, 8, 8, 12))


def test_explanations_are_the_same_with_a_head(headed_bundle: Path, tiny_bundle: Path) -> None:
    images = noise(2, 3, 32, 48)
    with ccam.load(headed_bundle) as one, ccam.load(tiny_bundle) as other:
        got, expected = one.explain(images), other.explain(images)
    np.testing.assert_array_equal(got.raw_saliency, expected.raw_saliency)


@pytest.mark.slow
def test_classifier_that_reads_the_image_past_the_layer_has_no_head(tmp_path: Path) -> None:
    model, settings = Detached().eval(), ExportSettings(head=True)
    with pytest.raises(LayerError, match='no head after layer "body": its logits depend on the im'):
        export(model, tmp_path / "x", (16, 16), ["body"], "fp32", settings)
    assert not (tmp_path / "x").exists()
    export(model, tmp_path / "x", (16, 16), ["body"])


@pytest.mark.slow
def test_head_that_differs_fails_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ones = np.ones((99, 5), np.float32)
    monkeypatch.setattr(Networks, "head_logits", lambda self, features, rest: ones[: len(features)])
    with pytest.raises(
        ToleranceError, match=r"fp32 graphs do not agree with PyTorch: head \S+ is above 0\.0001"
    ):
        export(tiny(), tmp_path / "x", (32, 48), None, "fp32", ExportSettings(head=True))
    assert not (tmp_path / "x").exists()


def test_verify_runs_the_head(headed_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives what PyTorch recorded; another one is found, in every precision."""
    single, half, *_ = success("verify", headed_bundle).stdout.splitlines()
    errors = [float(line.split(", head ")[1].split(",")[0]) for line in (single, half)]
    assert 0 <= errors[0] < 1e-5
    assert 1e-5 < errors[1] < 1e-2
    assert "logits of the head" in success("info", headed_bundle).stdout
    plain = Networks.head_logits
    monkeypatch.setattr(
        Networks, "head_logits", lambda self, features, rest: 1.25 * plain(self, features, rest)
    )
    line = failure("verify", headed_bundle)
    assert re.search(r"recorded: fp32: head 0\.25 is above 0\.0001; fp16: head 0\.25 is", line)


def test_verify_compares_with_what_was_recorded(headed_bundle: Path, tmp_path: Path) -> None:
    bundle = read_bundle(shutil.copytree(headed_bundle, tmp_path / "copy"))
    path = bundle.path(bundle.precision("fp32").reference)
    with np.load(path) as values:
        recorded = dict(values)
    networks = open_networks(bundle, "onnxruntime-cpu")
    try:
        np.savez_compressed(path, **{**recorded, "head": recorded["head"][:, ::-1]})
        _, broken = verify_bundle(bundle, networks, "fp32")
        assert [phrase.split()[0] for phrase in broken] == ["head"]
        del recorded["head"]
        np.savez_compressed(path, **recorded)
        with pytest.raises(IntegrityError, match="holds no head; export the bundle again"):
            verify_bundle(bundle, networks, "fp32")
    finally:
        networks.close()


def test_a_head_has_its_fidelity(headed_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(headed_bundle, tmp_path / "copy")
    manifest = read_bundle(copy).manifest
    whole = manifest.precisions["fp32"]
    assert whole.tolerance["head"] == 1e-4
    report = dataclasses.replace(whole.fidelity, head=UNSET)
    precisions = {**manifest.precisions, "fp32": dataclasses.replace(whole, fidelity=report)}
    write_manifest(copy, dataclasses.replace(manifest, precisions=precisions))
    with pytest.raises(ManifestError, match="the fidelity of fp32 and its graphs differ in head"):
        read_bundle(copy)


@pytest.mark.slow
def test_head_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(tiny().state_dict(), "net.pt")
    words = ["net.pt", "--arch", "tests.networks:tiny", "--input-size", "32x48"]
    success("export", *words, "--head", "--output", "tiny")
    with ccam.load("tiny") as explainer:
        assert "head" in explainer.networks.engines

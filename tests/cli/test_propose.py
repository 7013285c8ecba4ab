"""`ccam-deploy propose`: files for images, and a table for scenes whose boxes are known."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from ccam_deploy.checks import proposals
from ccam_deploy.image_files import load_image
from ccam_deploy.methods import LayerCAM
from tests.command import failure, run, success
from tests.helpers import SCENES, example_files

pytest.importorskip("cv2", reason="OpenCV is not installed")
SCENE = example_files()[6]


def test_boxes_of_an_image(digits_bundle: Path, tmp_path: Path) -> None:
    words = ["--target", "8", "--target", "5", "--boxes", 3, "--output", tmp_path / "out", "--json"]
    printed = success("propose", digits_bundle, SCENE, *words).stdout
    content = json.loads(printed)
    assert json.loads((tmp_path / "out" / "proposals.json").read_text()) == content
    (entry,) = content["images"]
    assert entry["classes"] == ["8", "5"]
    assert {peak["class"] for peak in entry["peaks"]} == {"8", "5"}
    assert len(entry["guided"]) == len(entry["selective_search"]) == 3
    ranked = [list(box) for box in proposals.selective_search(load_image(SCENE).convert("RGB"))]
    assert entry["selective_search"] == ranked[:3]
    for left, top, right, bottom in entry["guided"]:
        assert any(left <= p["x"] < right and top <= p["y"] < bottom for p in entry["peaks"])
    shown = np.asarray(load_image(tmp_path / "out" / "scene-7-digits-8-5-proposals.png"))
    assert (shown == (0, 220, 0)).all(axis=2).sum() > 100


def test_a_folder_of_images(digits_bundle: Path, tmp_path: Path) -> None:
    words = ("propose", digits_bundle, SCENES, "--output", tmp_path, "--limit", 2)
    lines = success(*words).stdout.splitlines()
    assert len(lines) == 2 * 2 + 1
    assert lines[0].startswith(f"{example_files()[0]}: class 9, peaks ")
    assert lines[-1] == f"  {tmp_path / 'proposals.json'}"


def test_images_that_cannot_be_read_are_passed_over(digits_bundle: Path, tmp_path: Path) -> None:
    """Each has its line, and the exit code is 2; with none that can, nothing is written."""
    broken, output = tmp_path / "broken\n.png", tmp_path / "out"
    broken.write_text("no image")
    done = run("propose", digits_bundle, broken, SCENE, "--output", output)
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        rf"error: {tmp_path}/broken\n.png is not an image of a known format "
        "(JPEG, PNG, WEBP, TIFF, BMP, GIF, PPM)"
    ]
    content = json.loads((output / "proposals.json").read_text())
    assert [entry["file"] for entry in content["images"]] == [str(SCENE)]
    assert "is not an image" in failure(
        "propose", digits_bundle, broken, "--output", tmp_path / "x"
    )
    assert not (tmp_path / "x").exists()


def test_the_file_says_what_its_numbers_are(digits_bundle: Path, tmp_path: Path) -> None:
    words = ["--method", "layer-cam", "--option", "gamma=3", "--boxes", 0, "--json"]
    found = success("propose", digits_bundle, SCENE, *words, "--output", tmp_path).stdout
    settings = json.loads(found)["settings"]
    assert settings["options"] == dataclasses.asdict(LayerCAM(gamma=3)) | {"layers": []}
    assert (settings["method"], settings["boxes"], settings["precision"]) == (
        "layer-cam",
        0,
        "fp32",
    )
    assert settings["backend"] == "onnxruntime-cpu"
    assert set(settings["definitions"]) >= {"boxes", "guided", "recall", "best_iou"}


@pytest.mark.slow
def test_peaks_make_boxes_of_scenes_better(digits_bundle: Path, tmp_path: Path) -> None:
    """As the paper's Figure 9 shows: on single objects by far, with as many boxes."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    words = ("propose", digits_bundle, "scenes", "--limit", 12, "--output", tmp_path)
    printed = success(*words).stdout.splitlines()
    assert re.split(" {2,}", printed[0])[2:4] == ["recall", "mean best IoU"]
    assert len(printed) == 9
    content = json.loads((tmp_path / "proposals.json").read_text())
    assert content["settings"]["limit"] == 12
    by_kind = {(e["scenes"], e["boxes_of"]): e for e in content["results"]}
    for kind in ("single", "two-classes", "several"):
        alone = by_kind[kind, "selective search"]
        guided = by_kind[kind, "with collection-cam"]
        assert alone["boxes"] == guided["boxes"] <= 12 * 5
        assert alone["objects"] == guided["objects"] >= 12
    assert by_kind["single", "with collection-cam"]["recall"] > (
        by_kind["single", "selective search"]["recall"] + 0.1
    )
    assert by_kind["single", "with collection-cam"]["best_iou"] > (
        by_kind["single", "selective search"]["best_iou"] + 0.05
    )
    assert (tmp_path / "scenes.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scenes", "--target", "3"], "--target goes with images; the classes of scenes are known"),
        (["none.png"], "none.png does not exist"),
        ([SCENE, "--peak-threshold", "0"], "0 is not in the range"),
        ([SCENE, "--seed", "4294967296"], "4294967296 is not in the range 0<=x<=4294967295"),
        ([SCENE, "--mode", "slow"], "'slow' is not one of 'fast', 'quality'"),
        ([SCENE, "--option", "depth=3"], 'option "depth" is unknown; collection-cam has theta'),
        ([SCENE, "--target", "zebra"], 'class "zebra" is not in the bundle'),
    ],
)
def test_bad_input(
    digits_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in failure("propose", digits_bundle, *words)
    assert not list(tmp_path.iterdir())


def test_without_opencv(digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert "pip install 'ccam-deploy[proposals]'" in failure("propose", digits_bundle, SCENE)

"""`ccam-deploy sanity`: table, JSON and picture of a small network; bad input in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ccam_deploy.bundle.manifest import Activation
from ccam_deploy.image_files import load_image
from ccam_deploy.methods import scores
from tests.command import failure, success
from tests.helpers import SCENES
from tests.networks import tiny

pytest.importorskip("skimage", reason="scikit-image is not installed")
ARCH = ("--arch", "tests.networks:tiny", "--input-size", "32x48", "--threads", "1")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save(tiny().state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.mark.slow
def test_a_check_is_printed_and_written(weights: Path) -> None:
    content_before = weights.read_bytes()
    words = ("sanity", weights, *ARCH, "--images", SCENES, "--limit", 2, "--depth", 2)
    lines = success(*words).stdout.splitlines()
    assert lines[0].split() == ["randomised", "layer", "|Spearman|", "SSIM", "HOG"]
    numbers = r"\d\.\d{3} +-?\d\.\d{3} +-?\d\.\d{3}"
    for line, (mode, layer) in zip(
        lines[1:5],
        [(mode, layer) for mode in ("cascading", "independent") for layer in ("head", "conv2")],
        strict=True,
    ):
        assert re.fullmatch(rf"{mode} +{layer} +{numbers}", line)
    assert lines[5:] == ["  sanity/sanity.png", "  sanity/sanity.json"]
    content = json.loads(Path("sanity/sanity.json").read_text())
    assert content["settings"]["images"] == 2
    assert content["settings"]["target_layers"] == ["relu1", "relu2"]
    assert len(content["stages"]) == 4
    assert content["stages"][0]["spearman"] == content["stages"][2]["spearman"]
    assert load_image(Path("sanity/sanity.png")).height > 4 * 128
    assert weights.read_bytes() == content_before


@pytest.mark.slow
def test_scenes_and_other_methods(weights: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    words = ("--images", "scenes", "--limit", 3, "--method", "grad-cam", "--depth", 1, "--json")
    content = json.loads(success("sanity", weights, *ARCH, *words).stdout)
    assert content["settings"]["method"] == "grad-cam"
    assert content["settings"]["options"] == {"layer": "", "relu": True}
    assert set(content["stages"][0]) - {"layer", "mode"} <= set(content["settings"]["definitions"])
    assert content["settings"]["images"] == 3


@pytest.mark.slow
def test_a_single_logit_is_checked_by_its_sigmoid(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One label names one of its two classes, and RISE's scores are not a softmax of both."""
    used: list[str] = []
    plain = scores.probabilities

    def watched(logits: NDArray[np.float32], activation: Activation) -> NDArray[np.float32]:
        used.append(activation)
        return plain(logits, activation)

    monkeypatch.setattr(scores, "probabilities", watched)
    Path("one.toml").write_text(
        'name = "one"\narch = "tests.networks:make_tiny(classes=1)"\nlabels = ["defect"]\n'
        "[input]\nsize = [32, 48]\n"
    )
    words = ("--recipe", "one.toml", "--random-weights", "--threads", "1", "--images", SCENES)
    rise = ("--method", "rise", "--option", "masks=4", "--limit", 2, "--depth", 1)
    success("sanity", *words, *rise)
    assert set(used) == {"sigmoid"}
    assert Path("sanity/sanity.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--depth", "9"], "--depth is 9; the model has 3 layers with parameters"),
        (["--limit", "17"], "--limit is 17; a check takes at most 16"),
        (["--seed", "-1"], "-1 is not in the range 0<=x<=4294967295"),
        (["--images", "none"], "none does not exist"),
        (["--method", "magic"], "'magic' is not one of 'collection-cam'"),
        (["--option", "depth=1"], 'option "depth" is unknown; collection-cam has theta'),
        (["--colormap", "rainbow"], 'color map "rainbow" is unknown'),
        (["--mean", "0.5"], "mean and std have 1 and 3 values; both need 1, or both 3"),
        (["--resize", "stretch", "--cover", "64"], "--cover goes with --resize crop"),
    ],
)
def test_bad_input(weights: Path, words: list[str], message: str) -> None:
    assert message in failure("sanity", weights, *ARCH, *words)
    assert [path.name for path in weights.parent.iterdir()] == ["net.pt"]


def test_no_model() -> None:
    assert "give a model file, or a --recipe that names its own network" in failure("sanity")

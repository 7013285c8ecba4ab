"""`ccam-deploy export`: the bundle, what it prints, and a disk that is full."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ccam_deploy.bundle.folder import read_bundle
from tests.cli.files import picture, tree
from tests.command import WEIGHTS, refusal, run, success
from tests.damage import contents, full_disk
from tests.networks import tiny


@pytest.mark.slow
def test_export_of_a_program(models: Path, here: Path) -> None:
    (here / "names.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    result = success("export", models / "net.pt2", "--labels", "names.txt", "--json")
    report = json.loads(result.stdout)
    bundle = read_bundle(here / "engines" / "net")
    assert report["bundle"] == "engines/net"
    assert report["manifest"]["digest"] == bundle.manifest.digest
    assert bundle.manifest.labels == ("ant", "bee", "cat", "dog", "eel")
    assert (bundle.manifest.name, bundle.manifest.source) == ("net", "net.pt2")
    assert "converting the fp32 graphs of relu1, relu2" in result.stderr.splitlines()
    assert tree(here / "engines") == ["net", *(f"net/{name}" for name in tree(bundle.folder))]


@pytest.mark.slow
def test_export_of_weights(models: Path, here: Path, tiny_bundle: Path) -> None:
    options = [*WEIGHTS, "--layers", "relu1, relu2", "--output", "out"]
    options += ["--mean", "0.485,0.456,0.406", "--calibration-images", str(here)]
    picture(here / "calibration.png")
    result = success("export", models / "net.pt", *options)
    first, second = result.stdout.splitlines()
    assert first == "out: 5 classes, layers relu1, relu2"
    number = r"\d\.\de[-+]\d\d"
    pattern = (
        f"fp32 against PyTorch: logits {number}, gradients {number}, saliency rank correlation "
    )
    pattern += r"[01]\.\d{4} \([01]\.\d{4} for the worst of 8 images\)$"
    assert re.match(pattern, second)
    assert read_bundle("out").precision("fp32").fidelity.images == 8
    for name in ("backbone.onnx", "weights.bin"):
        assert (here / "out" / name).read_bytes() == (tiny_bundle / name).read_bytes()
    assert "which this export replaces if it succeeds" not in result.stderr


@pytest.mark.slow
def test_a_bundle_that_will_be_replaced_is_named(
    models: Path, here: Path, tiny_bundle: Path
) -> None:
    shutil.copytree(tiny_bundle, here / "engines" / "net")
    result = success("export", models / "net.pt2", "--layers", "relu2")
    line = "there is a bundle in engines/net, which this export replaces if it succeeds"
    assert result.stderr.splitlines().count(line) == 1
    assert [layer.name for layer in read_bundle("engines/net").manifest.layers] == ["relu2"]


class ExportingError(Exception):
    """Raised where an export would begin."""


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["--calibration-images", "."], 3),
        (["--calibration-images", ".", "--limit", 2], 2),
        (["--limit", 1], 1),
    ],
)
def test_limit_caps_the_images_of_an_export(
    models: Path, here: Path, monkeypatch: pytest.MonkeyPatch, words: list[object], count: int
) -> None:
    def note(*arguments: Any) -> None:
        counts.append(len(arguments[-1].calibration))
        raise ExportingError

    counts: list[int] = []
    monkeypatch.setattr("ccam_deploy.export.export", note)
    for name in "abc":
        picture(here / f"{name}.png")
    assert isinstance(run("export", models / "net.pt2", *words).exception, ExportingError)
    assert counts == [count]


@pytest.mark.slow
def test_pickles_are_warned_of_only_where_there_are_any(models: Path, here: Path) -> None:
    torch.save(tiny(), here / "pickled.pt")
    for file, warnings in (("pickled.pt", 1), (models / "net.pt2", 0)):
        result = success("export", file, "--allow-pickle", "--input-size", "32x48", "--output", "o")
        assert result.stderr.count("runs the code that it holds") == warnings


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1000, 10000])
def test_full_disk_while_exporting(models: Path, tiny_bundle: Path, here: Path, limit: int) -> None:
    """In the weights, and in the recorded values."""
    shutil.copytree(tiny_bundle, here / "tiny")
    before = contents(here)
    with full_disk(limit):
        result = run("export", models / "net.pt2", "--output", "tiny")
    assert refusal(result) == "cannot write tiny: File too large"
    assert contents(here) == before
    assert [path.name for path in here.iterdir()] == ["tiny"]

"""The benchmark of target layers: what it measures, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import bench_layers as bench
from bench.photographs import Crop
from ccam_deploy.methods import CollectionCAM
from ccam_deploy.quality.variants import Variant

pytest.importorskip("skimage", reason="scikit-image is not installed")

CHOICES = {"both": ("relu1", "relu2"), "deep": ("relu2",)}


def test_every_layer_is_exported_once() -> None:
    assert bench.every_layer({"a": ("x", "y"), "b": ("y", "z")}) == ["x", "y", "z"]
    assert bench.make_variants(CHOICES)[1] == Variant("deep", CollectionCAM(layers=("relu2",)))


@pytest.mark.slow
def test_choices_are_measured_over_photographs(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crops = [Crop("chelsea", (0, 0, 300, 300)), Crop("coffee", (0, 0, 300, 300))]
    monkeypatch.setattr(bench, "sure_crops", lambda explainer, most: crops)
    monkeypatch.setitem(bench.CHOICES, "efficientnet_lite0", CHOICES)
    output = tmp_path / "layers.json"
    bench.main(["--bundle", str(tiny_bundle), "--output", str(output)])
    result = json.loads(output.read_text())
    assert set(result["results"]) == set(CHOICES)
    assert result["results"]["deep"]["deletion"]["images"] == 2
    assert result["unit"].endswith("over photographs")
    assert "- deep: relu2\n" in output.with_suffix(".md").read_text()

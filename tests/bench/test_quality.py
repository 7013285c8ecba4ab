"""The benchmark of quality: what it measures, and that its files say what they are of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ccam_deploy as ccam
from bench import bench_quality as bench
from ccam_deploy.methods import RISE, CollectionCAM
from ccam_deploy.quality.variants import Variant, runnable
from tests.helpers import DIGITS_LAYERS

pytest.importorskip("sklearn", reason="scikit-learn is not installed")


def test_ablations_vary_one_thing() -> None:
    groups = bench.ablations(DIGITS_LAYERS, ["collection-cam"])
    assert list(groups) == ["theta", "k range", "score", "standardise", "layers"]
    plain = vars(CollectionCAM())
    fields = {"theta": {"theta"}, "k range": {"k_min", "k_max"}, "score": {"score"}}
    fields |= {"standardise": {"standardise"}, "layers": {"layers"}}
    for title, group in groups.items():
        assert title == "layers" or group[0] == bench.DEFAULT
        for variant in group:
            options = vars(variant.method)
            assert {key for key in plain if options[key] != plain[key]} <= fields[title]
    names = [
        variant.name for group in groups.values() for variant in group if variant != bench.DEFAULT
    ]
    assert len(set(names)) == len(names)
    assert groups["layers"][0] == Variant(
        "collection-cam, 1 of 4 layers", CollectionCAM(layers=("layer4",))
    )
    assert groups["layers"][3].method == CollectionCAM(layers=DIGITS_LAYERS)


def test_a_method_that_runs_is_found(digits: ccam.Explainer) -> None:
    able, reasons = runnable(digits, bench.make_contenders(["collection-cam", "xrai"], 4000))
    assert able == [bench.DEFAULT]
    assert list(reasons) == ["xrai"]
    assert "export it with --gradients" in reasons["xrai"]


def test_rise_says_how_many_masks_it_has() -> None:
    usual, fewer = (bench.make_contenders(["cam", "rise"], masks) for masks in (4000, 10))
    assert [one.name for one in usual] == ["cam", "rise"]
    assert [one.name for one in fewer] == ["cam", "rise, masks=10"]
    assert (usual[1].method, fewer[1].method) == (RISE(), RISE(masks=10))


@pytest.mark.slow
def test_a_part_says_that_it_is_one(
    digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images and two ablations, written as JSON and Markdown."""
    monkeypatch.setattr(bench, "_ABLATED", {"theta": ({"theta": 0.5},)})
    output = tmp_path / "sub" / "quality.json"
    words = ["--bundle", str(digits_bundle), "--limit", "2", "--rounds", "1"]
    words += ["--methods", "collection-cam,xrai"]
    bench.main([*words, "--output", str(output), "--work", str(tmp_path / "work")])
    result = json.loads(output.read_text())
    assert result["limit"] == 2
    assert result["settings"]["images"] == 2
    assert set(result["results"]) == {"Methods", "theta", "layers"}
    assert set(result["results"]["theta"]) == {"collection-cam", "theta=0.5"}
    assert result["results"]["Methods"]["collection-cam"]["deletion"]["images"] == 2
    assert result["ms"]["collection-cam"]["calls"] == 1
    assert list(result["not_run"]) == ["xrai"]
    assert tuple(result["origins"]) == DIGITS_LAYERS
    for share in ("weight", "energy"):
        assert sum(shares[share] for shares in result["origins"].values()) == pytest.approx(100)
    layers = result["results"]["layers"]
    default = result["results"]["Methods"]["collection-cam"]
    assert layers["collection-cam, 4 of 4 layers"] == default
    text = output.with_suffix(".md").read_text()
    assert "**A part of the 500 test images: 2.**" in text
    assert "- xrai was not measured: the bundle has no input_gradient graph" in text
    assert "## Ablation: layers" in text
    assert "--methods collection-cam,xrai --limit 2" in result["command"]

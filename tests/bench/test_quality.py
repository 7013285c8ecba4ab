"""The benchmark of quality: what it measures, and that its files say what they are of."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import ccam_deploy as ccam
from bench import bench_quality as bench
from bench.photographs import Crop
from ccam_deploy.methods import RISE, CollectionCAM
from ccam_deploy.quality.variants import Variant, runnable
from tests.helpers import DIGITS_LAYERS

GATES = (0.001, 0.01, 0.1)

pytest.importorskip("skimage", reason="scikit-image is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")


def test_ablations_vary_one_thing() -> None:
    groups = bench.ablations(DIGITS_LAYERS, ["collection-cam"])
    assert list(groups) == ["theta", "k range", "score", "standardise", "gate", "layers"]
    plain = vars(CollectionCAM())
    fields = {"theta": {"theta"}, "k range": {"k_min", "k_max"}, "score": {"score"}}
    fields |= {"standardise": {"standardise"}, "gate": {"gate"}, "layers": {"layers"}}
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


def test_ablations_are_chosen_by_name() -> None:
    groups = bench.ablations(DIGITS_LAYERS, ["collection-cam"])
    assert tuple(groups) == bench.ABLATIONS
    assert list(bench._chosen(groups, "gate,k range")) == ["gate", "k range"]
    assert bench._chosen(groups, "none") == {}
    with pytest.raises(SystemExit, match='ablation "gates" is unknown; there are theta, k range'):
        bench._chosen(groups, "gates")


CROPS = [
    Crop("chelsea", (0, 0, 300, 300)),
    Crop("chelsea", (20, 20, 290, 280)),
    Crop("coffee", (0, 0, 300, 300)),
]


@pytest.mark.slow
def test_photographs_have_no_boxes_and_intervals_of_their_own(
    digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any network's bundle will do; the interval of two photographs has their means as its ends."""
    monkeypatch.setattr(bench, "sure_crops", lambda explainer, most, seed: CROPS)
    output, work = tmp_path / "quality.json", tmp_path / "work"
    words = ["--network", "efficientnet_lite0", "--bundle", str(digits_bundle), "--rounds", "1"]
    words += ["--methods", "collection-cam,grad-cam", "--ablations", "gate", "--crops", "2"]
    bench.main([*words, "--output", str(output), "--work", str(work)])
    result = json.loads(output.read_text())
    assert set(result["results"]) == {"Methods", "gate"}
    assert set(result["results"]["gate"]) == {"collection-cam", *(f"gate={g}" for g in GATES)}
    estimate = result["results"]["Methods"]["grad-cam"]["deletion"]
    rows = list(csv.DictReader((work / "results.csv").read_text().splitlines()))
    values = [float(row["deletion"]) for row in rows if row["method"] == "grad-cam"]
    ends = sorted([sum(values[:2]) / 2, values[2]])
    assert [estimate["low"], estimate["high"]] == pytest.approx(ends)
    assert estimate["mean"] == pytest.approx(sum(values) / 3)
    assert "proportion" not in result["results"]["Methods"]["grad-cam"]
    assert all("proportion" not in shares for shares in result["origins"].values())
    text = output.with_suffix(".md").read_text()
    assert "Crops of 2 photographs, up to 2 of each" in text
    assert "--network efficientnet_lite0 --crops 2" in text
    assert "A part of" not in text
    assert "in the boxes" not in text


@pytest.mark.slow
def test_a_part_says_that_it_is_one(
    digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images and two ablations, written as JSON and Markdown."""
    monkeypatch.setattr(bench, "_ABLATED", {"theta": ({"theta": 0.5},)})
    output = tmp_path / "sub" / "quality.json"
    words = ["--bundle", str(digits_bundle), "--limit", "2", "--rounds", "1"]
    words += ["--methods", "collection-cam,xrai", "--ablations", "theta,layers"]
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

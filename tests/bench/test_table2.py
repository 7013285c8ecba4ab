"""The benchmark of Table 2: its copy of the paper's figures, its methods, its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import bench_table2 as bench
from ccam_deploy import methods


def test_figures_are_the_paper_s() -> None:
    """Spot checks, and the reductions that the paper's text states (98.27 % and 99.73 %)."""
    assert len(bench.PAPER) == 6
    assert bench.PAPER["vgg19", 256]["grad-cam++"] == 21.04
    assert bench.PAPER["resnet18", 224]["collection-cam"] == 54.15
    for network, other, stated in (
        ("resnet101", "score-cam", 0.9827),
        ("resnet18", "rise", 0.9973),
    ):
        row = bench.PAPER[network, 256]
        assert 1 - row["collection-cam"] / row[other] == pytest.approx(stated, abs=1e-4)


def test_methods_are_those_of_the_package() -> None:
    assert bench.method_names()[0] == "collection-cam"
    assert set(bench.method_names()) == set(methods.METHODS)


def timing(median: float, ratio: float) -> dict[str, Any]:
    return {"ms": {"median": median, "p95": 2 * median, "spread": 0.05}, "ratio": ratio}


def test_table_has_the_paper_beside() -> None:
    results = {
        "resnet18-224": {
            "methods": {"collection-cam": timing(300, 1), "grad-cam": timing(30, 0.1)},
        },
        "other-64": {"methods": {"collection-cam": timing(5, 1)}},
    }
    assert bench.table(results).splitlines()[2:] == [
        "| resnet18 | 224×224 | collection-cam | 300.0 | 600.0 | 5% | 1.00 | 54.15 | 1.00 |",
        "| resnet18 | 224×224 | grad-cam | 30.0 | 60.0 | 5% | 0.10 | 13.10 | 0.24 |",
        "| other | 64×64 | collection-cam | 5.0 | 10.0 | 5% | 1.00 | - | - |",
    ]


def test_one_bundle_is_measured(tiny_bundle: Path) -> None:
    names = ["collection-cam", "grad-cam", "recipro-cam"]
    result = bench.measure(tiny_bundle, rounds=2, duration=0.0, names=names)
    json.dumps(result)
    assert list(result["methods"]) == ["collection-cam", "grad-cam"]
    assert "--head" in result["refused"]["recipro-cam"]
    figures = result["methods"]["collection-cam"]
    assert figures["ms"]["calls"] == 2
    assert figures["ratio"] == 1
    assert result["masks"] >= 2
    text = bench.markdown(bench.report({"tiny-32": result}, "python -m bench.bench_table2"))
    assert "Made by `python -m bench.bench_table2`." in text
    assert result["backend"] in text
    assert ", fp32, random weights" in text


def test_file_is_named_after_what_was_measured() -> None:
    cpu = {"backend": "onnxruntime-cpu", "precision": "fp32"}
    half = {"backend": "tensorrt", "precision": "fp16"}
    assert bench.file_name({"a-1": cpu, "b-1": cpu}) == "table2-onnxruntime-cpu.json"
    assert bench.file_name({"a-1": half}) == "table2-tensorrt-fp16.json"

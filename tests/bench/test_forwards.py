"""The benchmark of methods against their own forwards: what is run again, its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ccam_deploy as ccam
from bench import bench_forwards as bench
from ccam_deploy.engines.onnxruntime import OnnxRuntimeEngine
from tests.helpers import noise


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "masks"), [(3, [3, 3, 2]), (16, [8])])
def test_what_score_cam_runs_is_kept(tiny_bundle: Path, batch_size: int, masks: list[int]) -> None:
    """The backbone once, then the classifier on the masks of eight channels."""
    images = noise(1, 3, 32, 48)
    with ccam.load(tiny_bundle, batch_size=batch_size) as explainer:
        runs = bench.record_runs(explainer, images, "score-cam")
        engines = explainer.networks.engines
        assert [engine for engine, _ in runs] == [
            engines["backbone"],
            *[engines["classifier"]] * len(masks),
        ]
        np.testing.assert_array_equal(runs[0][1]["images"], images)
        assert [feeds["masks"].shape for _, feeds in runs[1:]] == [(n, 1, 32, 48) for n in masks]


def test_what_is_timed(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Explanations and their runs alone, two rounds and one of warm-up."""
    with ccam.load(tiny_bundle) as explainer:
        counted: list[OnnxRuntimeEngine] = []
        plain = OnnxRuntimeEngine._run_impl

        def counting(engine: OnnxRuntimeEngine, feeds: Any) -> Any:
            counted.append(engine)
            return plain(engine, feeds)

        monkeypatch.setattr(OnnxRuntimeEngine, "_run_impl", counting)
        figures = bench.measure(explainer, noise(1, 3, 32, 48), "score-cam", rounds=2)
    assert figures["runs"] == 2
    assert len(counted) == figures["runs"] * (1 + 2 * (1 + 2))
    assert figures["masked_images"] == 8
    assert figures["explain_ms"]["calls"] == figures["forwards_ms"]["calls"] == 2
    assert set(figures["stages_ms"]) == {"preprocess", "backbone", "masks", "classifier", "combine"}
    json.dumps(figures)


def test_table() -> None:
    figures = {
        "masked_images": 512,
        "explain_ms": {"median": 1070.0, "spread": 0.02},
        "forwards_ms": {"median": 1000.0, "spread": 0.04},
        "overhead": 1.0712,
    }
    lines = bench.table({"resnet18": {"score-cam": figures}}).splitlines()
    assert lines[2:] == ["| resnet18 | score-cam | 512 | 1070 | 1000 | 1.071 | 4% |"]

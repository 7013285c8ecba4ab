"""The benchmark of flipped activations: what it compares, and its table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ccam_deploy as ccam
from bench import bench_flips as bench
from bench.photographs import Crop
from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Activations, Networks
from ccam_deploy.methods import CollectionCAM

pytest.importorskip("skimage", reason="scikit-image is not installed")

CROPS = [Crop("chelsea", (0, 0, 300, 300)), Crop("chelsea", (50, 20, 200, 180))]


class Flipped:
    """The same graphs, but the shallow layer's gradient of the second image is another."""

    def __init__(self, networks: Networks, scale: float) -> None:
        self.networks, self.scale = networks, scale

    def backbone(self, images: Floats) -> Activations:
        """See Classifier."""
        return self.networks.backbone(images)

    def gradients(self, activations: Activations, output_gradient: Floats) -> tuple[Floats, ...]:
        """See Classifier."""
        shallow, *others = self.networks.gradients(activations, output_gradient)
        changed = shallow.copy()
        changed[1] *= np.float32(self.scale)
        return changed, *others


@contextmanager
def loaded(bundle: Path) -> Iterator[ccam.Explainer]:
    with ccam.load(bundle) as explainer:
        yield explainer


@pytest.mark.slow
def test_equal_gradients_move_nothing(tiny_bundle: Path) -> None:
    with loaded(tiny_bundle) as explainer:
        same = Flipped(explainer.networks, 1.0)
        result = bench.measure(explainer, same, CROPS, {"plain": CollectionCAM()})  # type: ignore[arg-type]
    assert result == {
        "gradients": [0.0, 0.0],
        "maps": {"plain": [0.0, 0.0]},
        "partitions": {"plain": [False, False]},
    }


def test_only_the_crop_with_other_gradients_moves(tiny_bundle: Path) -> None:
    """Its gradients of the other sign: off by twice their size, and other pixels count."""
    method = replace(CollectionCAM(), k_max=2)
    with loaded(tiny_bundle) as explainer:
        other = Flipped(explainer.networks, -1.0)
        result = bench.measure(explainer, other, CROPS, {"plain": method, "soft": method})  # type: ignore[arg-type]
    assert result["gradients"] == [0.0, pytest.approx(2.0)]
    assert result["maps"]["plain"][0] == 0
    assert result["maps"]["plain"][1] > bench.LIMIT
    assert result["maps"]["soft"] == result["maps"]["plain"]


def test_summary_and_table_by_hand() -> None:
    summary = bench.summarise([0.0, 0.01, 0.06, 0.2])
    assert summary == pytest.approx({"moved": 2, "median": 0.035, "p90": 0.158, "worst": 0.2})
    text = bench.markdown(
        {
            "gradients": [1e-6, 1e-6, 1e-3, 2.5e-2],
            "summary": {"gate=0": summary},
            "partitions": {"gate=0": [False, False, False, True]},
            "network": "some_net",
            "photographs": 3,
            "bound": 0.4,
            "command": "python -m bench.bench_flips",
            "conditions": {"processor": "some CPU", "cores": 2},
        }
    )
    assert "| gate=0 | 2 of 4 | 0.0350 | 0.1580 | 0.2000 | 1 |" in text
    assert "4 crops of 3 photographs" in text
    assert "differ by 5.0e-04 (median) to 2.5e-02 (worst)" in text


@pytest.mark.slow
def test_what_is_measured_is_written(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "flips.json"
    monkeypatch.setattr(bench, "sure_crops", lambda explainer, most: CROPS[:most])
    with loaded(tiny_bundle) as explainer:
        words = ["--bundle", str(tiny_bundle), "--crops", "2", "--gates", "0,0.1"]
        bench.main([*words, "--output", str(output)], lambda name: explainer.networks)
    result = json.loads(output.read_text())
    assert set(result["summary"]) == {"gate=0", "gate=0.1"}
    assert result["summary"]["gate=0.1"]["worst"] == 0
    assert "--crops 2 --gates 0,0.1" in result["command"]
    assert output.with_suffix(".md").exists()

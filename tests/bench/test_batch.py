"""The benchmark of batches: how rates are computed, and its table. It runs where Ray is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import bench_batch as bench


def test_the_rate_counts_from_the_first_beginning_to_the_last_end() -> None:
    assert bench.rate(30, [(1.0, 4.0), (2.0, 7.0), (3.0, 5.0)]) == 5.0


def test_both_are_run_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, int]] = []

    def side_by_side(bundle: Path, files: list[Path], processes: int) -> float:
        assert all(file.is_file() for file in files)
        ran.append(("side by side", len(files)))
        return 10.0 + len(ran)

    def batch(bundle: Path, images: Path, processes: int) -> dict[str, float]:
        ran.append(("batch", len(list(images.iterdir()))))
        return {"images_per_second": 9.0 + len(ran), "seconds": 20.0 + len(ran)}

    monkeypatch.setattr(bench, "side_by_side", side_by_side)
    monkeypatch.setattr(bench, "batch", batch)
    result = bench.measure(Path("bundle"), 5, 2, 3)
    assert ran == [("side by side", 5), ("batch", 5)] * 3
    assert result["side_by_side_per_second"] == [11.0, 13.0, 15.0]
    assert result["batch_per_second"] == [11.0, 13.0, 15.0]
    assert result["ratio"] == 1.0
    last = bench.table({**result, "batch_per_second": [13.0, 26.0, 39.0]}).splitlines()[-1]
    cells = "| 2 | 5 | 26.00 (13.00 to 39.00) | 13.00 (11.00 to 15.00) | 1.000 | 24.0 |"
    assert last == cells


@pytest.mark.scale
@pytest.mark.slow
def test_a_small_measurement(digits_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "batch.json"
    words = ["--bundle", str(digits_bundle), "--images", "6", "--rounds", "1"]
    bench.main([*words, "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["command"].startswith("python -m bench.bench_batch --rounds 1 --images 6 ")
    figures = result["results"]
    assert figures["batch_per_second"][0] > 0
    assert figures["side_by_side_per_second"][0] > 0
    assert figures["batch_per_second"][0] / figures["side_by_side_per_second"][0] == pytest.approx(
        figures["ratio"]
    )
    assert result["command"] in output.with_suffix(".md").read_text()

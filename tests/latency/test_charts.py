"""Charts are files of the kind that was asked for, and show what was measured."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ccam_deploy import plotting
from ccam_deploy.errors import OptionError
from ccam_deploy.latency import charts
from ccam_deploy.latency.report import BatchLatency
from ccam_deploy.latency.timing import summarise


def figures(batch: int, concurrency: int = 1) -> BatchLatency:
    seconds = [0.01 * batch * (1 + step / 100) for step in range(50)]
    timing = summarise(seconds)
    return BatchLatency(
        batch=batch,
        concurrency=concurrency,
        latency_ms=timing,
        explanations_per_second=100.0,
        masked_forwards_per_second=1700.0,
        from_images_ms=timing,
        from_array_ms=timing,
        floor_ms=timing,
        overhead=1.0,
        compare={},
        stages_ms={"backbone": 2.0 * batch, "classifier": 7.0 * batch, "between": 1.0 * batch},
        device_ms=None,
        without_transfers_ms=None,
        device_launched_ms=None,
        host_ms=None,
        host_share=0.1,
        masks=[17],
        collections={"layer4": [17]},
        cpu_clock_mhz=None,
        gpu=None,
        gpu_clock_mhz=None,
        spreads={},
        samples_ms={"latency": [1000 * value for value in seconds]},
    )


@pytest.mark.slow
@pytest.mark.parametrize("batches", [(1,), (1, 8)])
def test_picture(batches: tuple[int, ...]) -> None:
    content = charts.draw_latency([figures(batch) for batch in batches], "digits", "png")
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 5


def test_drawing_names_batches_stages_and_floor() -> None:
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        text = charts.draw_latency([figures(1), figures(8, 2)], "digits, fp32", "svg").decode()
    for word in ("digits, fp32", "batch 1", "batch 8, 2 threads", "backbone", "between", "floor"):
        assert f">{word}</text>" in text


@pytest.mark.slow
def test_document() -> None:
    assert charts.draw_latency([figures(1)], "digits", "pdf").startswith(b"%PDF")


def test_names() -> None:
    assert plotting.plot_format(Path("a/b.SVG")) == "svg"
    for name in ("plot.gif", "plot", ".png"):
        with pytest.raises(OptionError, match=r"must end in \.png, \.svg or \.pdf"):
            plotting.plot_format(Path(name))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OptionError, match=r"pip install 'ccam-deploy\[plot\]'"):
        plotting.require_matplotlib()

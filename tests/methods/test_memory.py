"""What a process that explains holds at most, the engines' memory among it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bundles import Bundles
from tests.helpers import ROOT

EXPLAIN = """
import json, sys
import numpy as np
import ccam_deploy as ccam
from ccam_deploy.latency.conditions import peak_memory
from ccam_deploy.methods import RISE, ScoreCAM

images = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
options = {
    "score-cam": (ScoreCAM(channels=64), ScoreCAM()),
    "rise": (RISE(masks=64), RISE(masks=4000)),
}
method = sys.argv[2]
with ccam.load(sys.argv[1], backend="onnxruntime-cpu") as explainer:
    peaks = []
    for chosen in options[method]:
        result = explainer.explain(images, 1, method=chosen)
        peaks.append(peak_memory())
used = int(np.count_nonzero(result.weights[0])) if method == "score-cam" else 4000
print(json.dumps({"peaks": peaks, "used": used}))
"""


@pytest.fixture(scope="module")
def wide_bundle(bundles: Bundles) -> Path:
    return bundles.get("wide")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "masks"),
    [("score-cam", 2048), pytest.param("rise", 4000, marks=pytest.mark.nightly)],
)
def test_peak_memory_is_that_of_64_masks(wide_bundle: Path, method: str, masks: int) -> None:
    """Kept, 2,048 masks of 224×224 would take 392 MiB more, and 4,000 of them 766 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", EXPLAIN, str(wide_bundle), method],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    few, many = found["peaks"]
    assert found["used"] > 0.95 * masks
    assert many < few + 40

"""No run of an engine has more rows than the batch size, and none is made twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest

import ccam_deploy as ccam
from ccam_deploy.engines.base import Array
from ccam_deploy.engines.onnxruntime import OnnxRuntimeEngine
from ccam_deploy.methods import (
    METHODS,
    RISE,
    XRAI,
    IntegratedGradients,
    Method,
    SmoothGrad,
)
from tests.helpers import noise

BATCH_SIZE = 3
PAIRS = 5
OPTIONS: Mapping[str, Method] = {
    "rise": RISE(masks=8),
    "integrated-gradients": IntegratedGradients(steps=4),
    "smoothgrad": SmoothGrad(samples=4),
    "xrai": XRAI(steps=4),
}
PLACES = 8 * 12
"""Of the last feature map."""
IMAGES_OF_PARTS = 3
"""The pairs come in two parts, the first with one image and the second with both."""
ROWS: Mapping[str, Mapping[str, int]] = {
    "grad-cam": {"gradient": PAIRS},
    "grad-cam++": {"gradient": PAIRS},
    "layer-cam": {"gradient": PAIRS},
    # The check adds an image of zeros for each part, and the gradients of the part's classes.
    "cam": {"backbone": 2 + 2, "gradient": PAIRS + 3 + 1},
    "rise": {"classifier": 8 * IMAGES_OF_PARTS},
    "recipro-cam": {"head": PLACES * IMAGES_OF_PARTS},
    "integrated-gradients": {"input_gradient": 4 * PAIRS},
    "smoothgrad": {"input_gradient": 4 * PAIRS},
    "xrai": {"input_gradient": 2 * 4 * PAIRS},
    "guided-backprop": {"guided_gradient": PAIRS},
    "excitation-backprop": {"excitation": PAIRS},
}
"""How many rows each graph runs, for the methods of which that is known beforehand."""


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_each_run(headed_bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    rows: dict[str, list[int]] = defaultdict(list)
    plain = OnnxRuntimeEngine._run_impl
    with ccam.load(headed_bundle, backend="onnxruntime-cpu", batch_size=BATCH_SIZE) as explainer:
        graphs = {id(engine): graph for graph, engine in explainer.networks.engines.items()}

        def counting(engine: OnnxRuntimeEngine, feeds: Mapping[str, Array]) -> list[Array]:
            rows[graphs[id(engine)]].append(max(map(len, feeds.values())))
            return plain(engine, feeds)

        monkeypatch.setattr(OnnxRuntimeEngine, "_run_impl", counting)
        method = OPTIONS.get(name, METHODS[name]())
        result = explainer.explain(noise(2, 3, 32, 48), [[1, 2, 0, 3], 3], method=method)
    assert len(result) == PAIRS
    assert max(max(counts) for counts in rows.values()) <= BATCH_SIZE
    if name in ROWS:
        totals = {graph: sum(counts) for graph, counts in rows.items()}
        assert totals == {"backbone": 2} | dict(ROWS[name])

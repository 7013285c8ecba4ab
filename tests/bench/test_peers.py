"""The benchmark against other libraries: what it times, what it compares, and its table."""

from __future__ import annotations

import json
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ccam_deploy as ccam
from bench import bench_peers as bench
from bench import peers
from ccam_deploy.arrays import Floats
from ccam_deploy.latency.timing import measure_in_turn
from ccam_deploy.methods.rise import random_masks
from tests.helpers import noise
from tests.networks import tiny

for package in ("captum", "pytorch_grad_cam", "torchcam"):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)


class Twice(nn.Module):
    """One activation, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.second(self.act(self.first(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_a_module_called_twice_can_be_hooked_at_each_call() -> None:
    torch.manual_seed(0)
    model, image = Twice().eval(), noise(3, 16, 16)
    before = model(torch.from_numpy(image[None]))
    kept: list[tuple[int, ...]] = []
    for name in ("act", "act:1"):
        layer = peers.addressable(Twice().eval() if name != "act" else model, name, image)
        assert isinstance(layer, nn.Identity)
    layer = peers.addressable(model, "act.outputs.1", image)
    layer.register_forward_hook(lambda m, i, o: kept.append(tuple(o.shape)))
    for _ in range(2):
        torch.testing.assert_close(model(torch.from_numpy(image[None])), before)
    assert kept == [(1, 6, 4, 4)] * 2
    assert peers.addressable(model, "second", image) is model.second


def task() -> peers.Task:
    """The small network, explained by its last layer."""
    model = tiny()
    return peers.Task(model, model.relu2, noise(3, 32, 48), 2, 3)


@pytest.mark.slow
def test_all_methods_are_the_same_as_ours(tiny_bundle: Path, tmp_path: Path) -> None:
    """Score-CAM's masks are scaled before they are enlarged by TorchCAM: that differs a little."""
    masks = tmp_path / "masks.npy"
    np.save(masks, random_masks(np.random.default_rng(0), 10, 4, 0.5, (32, 48)))
    with ccam.load(tiny_bundle, batch_size=3) as explainer:
        made = bench.contests(explainer, task(), bench.METHODS, masks)
        results = {name: bench.measure(contest, 1, 0) for name, contest in made.items()}
    names = {name: tuple(figures) for name, figures in results.items()}
    assert names == {
        "collection-cam": ("ccam-deploy", "PyTorch"),
        "grad-cam": ("ccam-deploy", "pytorch-grad-cam", "TorchCAM", "Captum"),
        "layer-cam": ("ccam-deploy", "pytorch-grad-cam", "TorchCAM"),
        "score-cam": ("ccam-deploy", "pytorch-grad-cam", "TorchCAM"),
        "rise": ("ccam-deploy", "PyTorch"),
    }
    assert [name for name, contest in made.items() if contest.is_slow] == ["score-cam"]
    for method, by_name in results.items():
        for name, figures in by_name.items():
            least = 0.1 if method == "score-cam" else 2e-3
            assert figures["difference"] <= least, (method, name)


def test_ratio_and_difference_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that ours moves by 2 ms a call, and the other by 7 ms."""
    now = [0.0]

    def call(seconds: float, level: float) -> peers.Call:
        def explain() -> Floats:
            now[0] += seconds
            return np.full((2, 2), level, np.float32)

        return explain

    monkeypatch.setattr(
        bench,
        "measure_in_turn",
        lambda calls, rounds, warmup: measure_in_turn(calls, rounds, warmup, now=lambda: now[0]),
    )
    contest = bench.Contest({"ccam-deploy": call(0.002, 0.25), "other": call(0.007, 0.75)})
    result = bench.measure(contest, 3, 1)
    assert result["other"]["ratio"] == pytest.approx(3.5)
    assert result["other"]["difference"] == 0.5
    assert result["ccam-deploy"]["ms"]["median"] == pytest.approx(2)
    rows = bench.table({"grad-cam": result}).splitlines()[-2:]
    assert rows[0].split("|")[1:-1] == [" grad-cam ", " ccam-deploy ", " 2 ", "  ", "  "]
    assert rows[1].split("|")[2:-1] == [" other ", " 7 ", " 3.5× ", " 5.0e-01 "]


@pytest.mark.slow
def test_what_is_measured_is_written(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "make_task", lambda explainer, network, batch: task())
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    ticks = count()
    monkeypatch.setattr(bench, "load_average", lambda: next(ticks))
    output = tmp_path / "peers.json"
    words = ["--bundle", str(tiny_bundle), "--rounds", "1", "--rise-masks", "4", "--threads", "1"]
    bench.main([*words, "--no-slow", "--batch", "3", "--output", str(output)])
    result = json.loads(output.read_text())
    assert set(result["results"]) == set(bench.METHODS) - {"score-cam"}
    assert set(result["libraries"]) == {"pytorch-grad-cam", "TorchCAM", "Captum"}
    assert result["command"].endswith("--no-slow")
    assert "one image, class 2, target layer relu2" in output.with_suffix(".md").read_text()

"""The benchmark of networks that can be exported: its list, its processes, its tables."""

from __future__ import annotations

import json
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import bench_zoo as bench
from bench.zoo_list import ATTENTION, CONVOLUTION, ZooModel, kind_of
from tests.networks import tiny

NAMES = ("fake/good", "fake/bad")


class Blind(nn.Module):
    """Logits that do not depend on the feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * 0  # type: ignore[no-any-return]


def blind() -> nn.Module:
    return Blind()


def model(name: str, arch: str = "tests.networks:make_tiny", operators: int = 9) -> ZooModel:
    return ZooModel(name, CONVOLUTION, 32, 0.5, operators, arch)


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    models = [model("fake/bad", "tests.bench.test_zoo:blind", 10), model("fake/good")]
    path = tmp_path / "models.txt"
    path.write_text("".join(f"{each.line()}\n" for each in models))
    return path


def test_the_list_holds_every_library_and_kind() -> None:
    models = bench.read_list(bench.LIST)
    assert len(models) >= 150
    assert len({each.name for each in models}) == len(models)
    assert {each.name.partition("/")[0] for each in models} == {"timm", "torchvision"}
    assert {each.kind for each in models} == {ATTENTION, CONVOLUTION}
    assert [each.operators for each in models] == sorted(each.operators for each in models)


@pytest.mark.slow
def test_two_networks_in_processes_of_their_own(listed: Path, tmp_path: Path) -> None:
    """Both exports succeed; one of the networks is blind to its image."""
    output, page = tmp_path / "zoo.json", tmp_path / "zoo.md"
    bench.main([*words(listed, output), "--page", str(page)])
    results = json.loads(output.read_text())["results"]
    assert list(results) == ["fake/good", "fake/bad"], "the cheaper one comes first"
    good, bad = results.values()
    assert good["works"]
    assert good["layers"] == ["relu1 6x16x16", "relu2 8x8x8"]
    assert good["logits_error"] < 1e-5
    assert not bad["works"]
    assert bad["reason"]
    assert "| convolutional | 2 | 1 | 50.0% |" in page.read_text()


def test_a_broken_run_goes_on(
    listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, measured = tmp_path / "zoo.json", list[str]()

    def measure_all(models: list[ZooModel], *_: object) -> Any:
        for each in models:
            measured.append(each.name)
            works = each.name == "fake/good"
            yield each, {"works": works, "reason": "" if works else "broken", "seconds": 1.0}

    monkeypatch.setattr(bench, "measure_all", measure_all)
    bench.main([*words(listed, output), "--limit", "1"])
    assert measured == ["fake/good"]
    bench.main(words(listed, output))
    assert measured == ["fake/good", "fake/bad"]
    bench.main(words(listed, output))
    assert measured == ["fake/good", "fake/bad"], "both are measured"
    bench.main([*words(listed, output), "--only-failed"])
    assert measured == ["fake/good", "fake/bad", "fake/bad"]
    results = json.loads(output.read_text())["results"]
    assert results["fake/bad"]["reason"] == "broken"
    assert results["fake/bad"]["size"] == 32


SAMPLE = (
    "timm/test_resnet",
    "timm/test_efficientnet",
    "timm/test_convnext",
    "timm/test_mambaout",
    "timm/test_vit",
    "timm/mixer_s16_224",
    "timm/swin_tiny_patch4_window7_224",
    "torchvision/squeezenet1_1",
)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_list_works(name: str) -> None:
    if find_spec("timm") is None:  # its import fails beside some builds of PyTorch; ours does not
        pytest.skip("timm is not installed")
    listed = {each.name: each for each in bench.read_list(bench.LIST)}
    figures = bench.check(listed[name])
    assert len(figures["layers"]) > 1
    assert figures["logits_error"] < 1e-4


def words(listed: Path, output: Path) -> list[str]:
    return ["--list", str(listed), "--output", str(output)]


def test_names_with_and_without_their_library() -> None:
    models = [model("timm/resnet18"), model("torchvision/resnet18"), model("timm/vgg11")]
    for patterns, expected in (
        (("resnet*",), ["timm/resnet18", "torchvision/resnet18"]),
        (("timm/*",), ["timm/resnet18", "timm/vgg11"]),
    ):
        assert [each.name for each in bench.Choice(patterns).of(models)] == expected


def erratic(each: ZooModel) -> dict[str, Any]:
    if each.name == "hangs":
        time.sleep(600)
    if each.name == "dies":
        os._exit(7)
    return {"works": True, "reason": "", "seconds": 0.0}


@pytest.mark.slow
def test_processes_that_hang_or_die() -> None:
    """The second two take no imports: the first two have made the server of processes."""
    results = {
        each.name: figures["reason"]
        for names, timeout in ((("dies", "runs"), 120.0), (("hangs", "runs as well"), 5.0))
        for each, figures in bench.measure_all(list(map(model, names)), 2, timeout, erratic)
    }
    assert results == {
        "dies": "the process ended with 7",
        "runs": "",
        "hangs": "not done within 5 s",
        "runs as well": "",
    }


def test_an_error_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(each: ZooModel) -> dict[str, Any]:
        raise ValueError("not this one\nat all")

    monkeypatch.setattr(bench, "check", check)
    figures = bench.measure(model("fake/bad"))
    assert figures["reason"] == "not this one"
    assert not figures["works"]


def test_parameters_that_hide_what_is_behind_them_are_redrawn() -> None:
    network = bench.awake("tests.bench.test_zoo:sleeping")
    assert isinstance(network, Sleeping)
    assert network.head.weight.std() > 0
    assert ((network.scale >= 0.2) & (network.scale <= 0.8)).all()
    assert (network.norm.weight == 1).all()
    assert (network.head.bias == 0).all()


class Sleeping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.full((4,), 1e-6))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


def sleeping() -> nn.Module:
    return Sleeping()


def test_kinds() -> None:
    """Attention multiplies what depends on the image; a squeeze and a head do not."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.qkv = nn.Conv2d(3, 4, 8, 8), nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.patches(x).flatten(2).transpose(1, 2)).chunk(3, -1)
            attended = nn.functional.scaled_dot_product_attention(q, k, v)
            return attended.mean(1)

    assert kind_of(Attention(), torch.zeros(2, 3, 32, 32)) == ATTENTION
    assert kind_of(tiny(), torch.zeros(2, 3, 32, 32)) == CONVOLUTION
    mixer = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(2), nn.Linear(16, 16), nn.Flatten())
    assert kind_of(mixer, torch.zeros(2, 3, 32, 32)) == ATTENTION

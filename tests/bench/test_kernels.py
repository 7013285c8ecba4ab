"""The benchmark of the kernels: its timing on a device that takes the time it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import pytest

from bench import bench_kernels as bench
from ccam_deploy.engines.cuda.device import Device
from ccam_deploy.errors import BackendError
from ccam_deploy.export.architecture import import_module
from ccam_deploy.kernels.cuda import launch
from tests.clock import FakeClock
from tests.engines.cuda.host_device import HostDevice
from tests.kernels.simulated_device import simulator


class FakeDevice:
    """Replays work faster than it runs at first; an event is a moment of the clock."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.captured = 0
        self.closed = False

    def current(self) -> Any:
        return nullcontext()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        return work

    def mark(self) -> float:
        self.clock.time += 5  # what the host does between the events of two steps
        return self.clock.time

    def seconds(self, start: float, end: float) -> float:
        return end - start - 5

    def wait(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def test_steps_are_timed_in_turn_without_what_is_warm_up() -> None:
    device = FakeDevice()
    warm = 1 + bench._WARM_ROUNDS
    steps = {
        "one": device.clock.taking([9] * warm + [1, 2, 6]),
        "other": device.clock.taking([9] * warm + [10, 20, 30]),
    }
    seconds = bench.time_on_device(cast(Device, device), steps, 3)
    assert seconds == {"one": pytest.approx([1, 2, 6]), "other": pytest.approx([10, 20, 30])}
    assert device.captured == 2
    distribution = bench.distribution(seconds)
    assert (distribution["one"]["median"], distribution["other"]["median"]) == (2000, 20000)
    assert distribution["sum"]["median"] == 22000  # the median of 11, 22 and 36


@pytest.mark.parametrize("network", bench.SHAPES)
def test_layers_lie_one_after_the_other(network: str) -> None:
    shapes = bench.SHAPES[network]
    place = bench.geometry(network, 8)
    ends = [a.features + 8 * a.channels * a.height * a.width for a in place.layers]
    assert [layer.features for layer in place.layers] == [0, *ends[:-1]]
    assert [layer.gradients for layer in place.layers] == [0, *ends[:-1]]
    assert place.channels == sum(shape[0] for shape in shapes)


@pytest.mark.parametrize("network", bench.SHAPES)
def test_shapes_are_those_of_the_target_layers(network: str) -> None:
    models = import_module("torchvision.models")
    stages = ("features.8", "features.17", "features.26", "features.35")  # before pools 2 to 5
    names = stages if network == "vgg19" else ("layer1", "layer2", "layer3", "layer4")
    import torch

    outputs: list[tuple[int, ...]] = []
    with torch.device("meta"):
        model = getattr(models, network)().eval()
        for name in names:
            model.get_submodule(name).register_forward_hook(
                lambda module, inputs, output: outputs.append(tuple(output.shape[1:]))
            )
        model(torch.zeros(1, 3, 224, 224))
    assert tuple(outputs) == bench.SHAPES[network]


def measure_on_simulator() -> dict[str, Any]:
    """Two small layers and two images; called in the simulator's process."""
    launch.Threads.__init__.__defaults__ = (32,) * len(fields(launch.Threads))
    bench.SHAPES["tiny"] = ((6, 4, 4), (5, 2, 2))
    bench._SIZE, bench._CLASSES, bench._WARM_ROUNDS = (8, 8), 3, 0
    return bench.measure(cast(Device, HostDevice()), "tiny", 2, 1)


@pytest.mark.slow
def test_the_kernels_run() -> None:
    pytest.importorskip("numba_cuda", reason="numba-cuda is missing")
    with simulator() as pool:
        result = pool.submit(measure_on_simulator).result()
    assert 2 * 2 * 2 <= result["masks"] <= 2 * (6 + 5)
    assert list(result["kernels_ms"]) == [
        "output_gradient",
        "statistics",
        "partition",
        "sums",
        "masks",
        "scores",
        "combine",
        "sum",
    ]
    assert all(spent["median"] > 0 for spent in result["kernels_ms"].values())


def test_table() -> None:
    results = {
        "resnet18-1": {"masks": 16, "kernels_ms": {"sum": {"median": 0.1234, "p90": 0.2}}},
        "resnet18-8": {"masks": 130, "kernels_ms": {"sum": {"median": 1.5, "p90": 2}}},
    }
    assert bench.table(results).splitlines() == [
        "| median / p90, µs | resnet18-1 | resnet18-8 |",
        "|---|---|---|",
        "| masks | 16 | 130 |",
        "| sum | 123 / 200 | 1500 / 2000 |",
    ]


def test_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    devices: list[FakeDevice] = []

    def open_device() -> FakeDevice:
        devices.append(FakeDevice())
        return devices[-1]

    def measure(device: FakeDevice, network: str, batch: int, rounds: int) -> dict[str, Any]:
        return {"masks": batch * 16, "kernels_ms": bench.distribution({"sums": [0.001] * rounds})}

    monkeypatch.setattr(bench, "open_device", open_device)
    monkeypatch.setattr(bench, "measure", measure)
    bench.main(["--rounds", "4", "--output", str(tmp_path / "new")])
    result = json.loads((tmp_path / "new" / "kernels.json").read_text())
    assert list(result["results"]) == [f"{n}-{b}" for n in bench.SHAPES for b in bench.BATCHES]
    assert result["results"]["vgg19-8"]["kernels_ms"]["sums"]["calls"] == 4
    assert "Made by `python -m bench.bench_kernels" in (tmp_path / "new" / "kernels.md").read_text()
    assert "| sums | 1000 / 1000 |" in capsys.readouterr().out
    assert all(device.closed for device in devices)


def test_without_a_gpu_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def open_device() -> None:
        raise BackendError("no NVIDIA GPU can be used: no device")

    monkeypatch.setattr(bench, "open_device", open_device)
    with pytest.raises(SystemExit) as caught:
        bench.main([])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "kernels are measured on a GPU alone: no NVIDIA GPU can be used: no device\n"
    )

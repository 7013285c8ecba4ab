"""`ccam-deploy bench`: its file holds together, and bad input is one line before any measuring."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from ccam_deploy import explainer, plotting
from ccam_deploy.latency import cold_start, measurement
from ccam_deploy.latency.cold_start import LIMIT_S
from ccam_deploy.latency.report import LatencyReport
from ccam_deploy.latency.settings import FIRST_CALLS_S, Deadlines, LatencySettings
from ccam_deploy.latency.tables import report_text
from tests.command import failure, run, success
from tests.damage import full_disk
from tests.helpers import RECIPES, SCENES, example_files
from tests.networks import tiny

QUICK = ("--duration", "0.3", "--warmup", "0")
STAGES = (
    "preprocess",
    "backbone",
    "gradient",
    "statistics",
    "partition",
    "masks",
    "classifier",
    "combine",
)
FIGURES = {"calls", "median", "mean", "minimum", "maximum", "p90", "p95", "p99", "spread"}


@pytest.fixture(scope="module")
def digits_result(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A short run on the example network with everything that can be asked for."""
    folder = tmp_path_factory.mktemp("bench")
    done = success(
        "bench",
        digits_bundle,
        *example_files()[:2],
        *("--batch", "1,2", "--duration", "0.3", "--warmup", "0", "--threads", "1"),
        *("--compare", "onnxruntime-cpu,torch", "--recipe", RECIPES / "digits.toml"),
        *("--output", folder / "sub" / "found.json", "--plot", folder / "found.svg"),
    )
    assert (folder / "found.svg").read_text().startswith("<?xml")
    found: dict[str, Any] = json.loads((folder / "sub" / "found.json").read_text())
    return {**found, "stdout": done.stdout, "stderr": done.stderr}


def test_file_names_what_was_measured(digits_result: dict[str, Any], digits_bundle: Path) -> None:
    settings, conditions = digits_result["settings"], digits_result["conditions"]
    assert settings["method"] == "collection-cam"
    assert settings["options"]["k_max"] == 10
    assert settings["backend"] == "onnxruntime-cpu"
    assert settings["precision"] == "fp32"
    assert settings["threads"] == 1
    assert settings["batch_size"] == 16
    assert settings["images"] == [str(file) for file in example_files()[:2]]
    assert {"numpy", "onnxruntime", "torch"} <= set(conditions["versions"])
    assert conditions["processor"]
    assert conditions["load_average_before"] is not None
    assert digits_result["bundle"]["layers"] == ["layer1", "layer2", "layer3", "layer4"]
    assert digits_result["bundle"]["random_weights"] is False
    words = digits_result["command"].split()
    assert words[:3] == ["ccam-deploy", "bench", str(digits_bundle)]
    assert "--batch 1,2" in digits_result["command"]
    assert "--precision" not in words  # it is at its default


def test_figures_hold_together(digits_result: dict[str, Any]) -> None:
    assert [found["batch"] for found in digits_result["batches"]] == [1, 2]
    for found in digits_result["batches"]:
        batch, samples = found["batch"], found["samples_ms"]
        for name in ("latency", "from_images", "from_array", "floor"):
            spent = found[f"{name}_ms"]
            assert set(spent) == FIGURES
            assert spent["calls"] == len(samples[name]) >= 3
            order = [spent[key] for key in ("minimum", "median", "p90", "p95", "p99", "maximum")]
            assert order == sorted(order)
            assert spent["median"] > 0
        rate = found["explanations_per_second"] * found["latency_ms"]["mean"] / 1000
        assert rate == pytest.approx(batch, rel=0.05)  # one thread, without pauses
        masks = sum(found["masks"]) / len(found["masks"]) / batch
        assert found["masked_forwards_per_second"] == pytest.approx(
            found["explanations_per_second"] * masks, rel=1e-3
        )
        kinds = [sum(counts) for counts in zip(*found["collections"].values(), strict=True)]
        assert sum(found["masks"]) <= sum(kinds)
        assert found["overhead"] == pytest.approx(
            statistics_median_ratio(samples["from_array"], samples["floor"]), abs=1e-3
        )
        for name in ("gpu", "gpu_clock_mhz", "host_ms", "device_ms", "without_transfers_ms"):
            assert found[name] is None


def statistics_median_ratio(numerators: list[float], denominators: list[float]) -> float:
    from statistics import median

    return median(a / b for a, b in zip(numerators, denominators, strict=True))


def test_stages_fit_into_the_call(digits_result: dict[str, Any]) -> None:
    for found in digits_result["batches"]:
        samples = found["samples_ms"]
        assert set(found["stages_ms"]) == {*STAGES, "between"}
        for call, total in enumerate(samples["stages_total"]):
            inside = sum(samples[f"stage_{name}"][call] for name in STAGES)
            assert 0 < inside <= total + 0.01  # samples are rounded to microseconds
        assert all(value >= 0 for value in found["stages_ms"].values())


def test_comparisons(digits_result: dict[str, Any]) -> None:
    """The same backend again takes about as long; one forward a mask in PyTorch takes longer."""
    for found in digits_result["batches"]:
        assert set(found["compare"]) == {"onnxruntime-cpu", "torch"}
        assert 0.3 < found["compare"]["onnxruntime-cpu"]["ratio"] < 3
        assert found["compare"]["torch"]["ratio"] > 1
        for name in ("onnxruntime-cpu", "torch"):
            turns = found["samples_ms"]
            assert len(turns[name]) == len(turns[f"from_array_beside_{name}"])


def test_cold_starts(digits_result: dict[str, Any]) -> None:
    assert [start["batch"] for start in digits_result["cold_start"]] == [1, 2]
    for start in digits_result["cold_start"]:
        assert start["total_ms"] > start["imports_ms"] + start["load_ms"] + start["first_ms"]
        assert start["peak_memory_mib"] > 20
        assert start["device_memory_mib"] is None


def test_parts_are_told_on_stderr_as_they_are_known(digits_result: dict[str, Any]) -> None:
    lines = digits_result["stderr"].splitlines()
    starts = [line for line in lines if "cold start" in line]
    assert [line.partition(" ms")[0].rpartition(" ")[0] for line in starts[1::2]] == [
        "batch 1: cold start",
        "batch 2: cold start",
    ]
    for batch in (1, 2):
        told = [line for line in lines if line.startswith(f"batch {batch}: ")]
        for word in ("latency ", "classifier ", "overhead ", "torch "):
            assert any(word in line for line in told)


def test_table_for_a_person(digits_result: dict[str, Any]) -> None:
    text = digits_result["stdout"]
    for word in ("latency, ms", "overhead", "cold start, ms", "times as long", "classifier"):
        assert word in text
    for found in digits_result["batches"]:
        assert f"{found['overhead']:.3f}" in text
    for line in digits_result["warnings"]:
        assert f"warning: {line}" in digits_result["stderr"]
    assert any("p99 is of" in line for line in digits_result["warnings"])


def test_table_of_a_gpu(digits_result: dict[str, Any]) -> None:
    assert "without transfers" not in digits_result["stdout"]
    sizes = dict.fromkeys(
        ("max_clock_mhz", "memory_clock_mhz", "memory_mib", "total_memory_mib"), None
    )
    heat = {"temperature_celsius": None, "power_watts": None}
    card = {"gpu": {"name": "NVIDIA H100", "driver": "580.95.05", **sizes, **heat}}
    clock = {"gpu_clock_mhz": {"minimum": 1755.0, "median": 1900.0, "maximum": 1980.0}}
    times = {"device_ms": 1.5, "without_transfers_ms": 1.25, "host_ms": 0.5}
    batches = [{**found, **times, **card, **clock} for found in digits_result["batches"]]
    report = msgspec.convert({**digits_result, "batches": batches}, LatencyReport)
    text = report_text(report)
    assert "1755 to 1980 under load" in text
    assert ["batch", "2", "1.5", "1.25", "0.5"] in [line.split() for line in text.splitlines()]


@pytest.mark.slow
def test_json_on_stdout_alone(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = []
    load = explainer.load

    def noted(*arguments: Any, **how: Any) -> explainer.Explainer:
        slots.append(how["slots"])
        return load(*arguments, **how)

    monkeypatch.setattr(explainer, "load", noted)
    done = success("bench", tiny_bundle, *QUICK, "--json", "--concurrency", 2, "--no-cold-start")
    found = json.loads(done.stdout)
    assert found["cold_start"] == []
    assert "--no-cold-start" in found["command"].split()
    assert "cold start" not in done.stderr
    assert "batch 1: latency " in done.stderr
    (report,) = found["batches"]
    assert slots == [2]
    assert found["settings"]["slots"] is None  # which only a GPU has
    assert report["concurrency"] == found["settings"]["concurrency"] == 2
    calls = report["latency_ms"]["calls"]
    assert calls == len(report["samples_ms"]["latency"]) >= 6
    busy = report["explanations_per_second"] * report["latency_ms"]["mean"] / 1000
    assert 1 < busy <= 2.01  # explanations a second × latency: how many were under way
    assert found["settings"]["images"] == ["a photograph of the package"]


@pytest.mark.slow
def test_cold_start_that_takes_too_long(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left out, with a warning, and the rest is measured."""
    monkeypatch.setattr(cold_start, "measure_cold_start", lambda *_: None)
    done = success("bench", tiny_bundle, *QUICK, "--output", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["cold_start"] == []
    assert found["warnings"][0] == "batch 1: the cold start took over 20 s and was ended"
    assert "latency, ms" in done.stdout


class MeasuringError(Exception):
    """Raised where a measurement would begin."""


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_nothing(*arguments: object) -> None:
        raise MeasuringError

    monkeypatch.setattr(measurement, "measure_latency", measure_nothing)


@pytest.mark.parametrize(("words", "count"), [((), 8), (("--limit", 3), 3)])
def test_limit_caps_the_images(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], count: int
) -> None:
    def note(bundle: Path, files: Sequence[Path], *arguments: object) -> None:
        counts.append(len(files))
        raise MeasuringError

    counts: list[int] = []
    monkeypatch.setattr(cold_start, "measure_cold_start", note)
    result = run("bench", tiny_bundle, SCENES, *QUICK, *words)
    assert isinstance(result.exception, MeasuringError)
    assert counts == [count]


@pytest.mark.usefixtures("no_measuring")
class TestBadInput:
    """One line each, before anything is measured."""

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--backend", "tpu"), "'tpu' is not one of"),
            (("--batch", "0"), "batch is [0]; it must be at least 1"),
            (("--batch", "1,x"), "'--batch': \"1,x\" is not a list of whole numbers such as 1,8"),
            (("--batch", ""), "'--batch': \"\" is not a list of whole numbers such as 1,8"),
            (("--concurrency", "0"), "concurrency is 0; it must be 1 to 64"),
            (("--duration", "0"), "duration is 0; it must be above 0 seconds"),
            (("--duration", "-3"), "duration is -3; it must be above 0 seconds"),
            (("--warmup", "-1"), "warmup is -1; it must be 0 seconds or more"),
            (("--compare", "tpu"), '--compare "tpu" is unknown; there are tensorrt'),
            (("--compare", "auto"), '--compare "auto" is unknown'),
            (("--compare", "torch"), "--compare torch needs the bundle's model in PyTorch"),
            (("--model", "x.pt2"), "--model goes with --compare torch"),
            (("--recipe", "x.toml"), "--recipe goes with --compare torch"),
            (("--random-weights",), "--random-weights goes with --compare torch"),
            (("--precision", "fp16"), "the bundle has no fp16 graphs"),
            (("--plot", "plot.gif"), "the plot plot.gif must end in .png, .svg or .pdf"),
            (("none.png",), "none.png does not exist"),
        ],
    )
    def test_options(self, tiny_bundle: Path, words: tuple[str, ...], message: str) -> None:
        assert message in failure("bench", tiny_bundle, *words)

    def test_image_that_cannot_be_read(self, tiny_bundle: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"\x89PNG\r\n\x1a\n")
        assert f"{broken} is not an image" in failure("bench", tiny_bundle, broken)

    @pytest.mark.parametrize(("option", "name"), [("--output", "x.json"), ("--plot", "x.png")])
    def test_file_that_cannot_be_written(
        self, tiny_bundle: Path, tmp_path: Path, option: str, name: str
    ) -> None:
        (tmp_path / "file").write_text("in the way")
        (tmp_path / name).mkdir()
        message = failure("bench", tiny_bundle, option, tmp_path / name)
        assert message == f"cannot write {tmp_path / name}: it is a folder"
        beyond = tmp_path / "file" / name
        assert f"cannot write {beyond}: " in failure("bench", tiny_bundle, option, beyond)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["file", name])

    def test_plot_without_matplotlib(
        self, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        message = failure("bench", tiny_bundle, "--plot", tmp_path / "x.png")
        assert "pip install 'ccam-deploy[plot]'" in message

    def test_torch_without_pytorch(
        self, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        words = ("--compare", "torch", "--model", "x.pt2")
        message = failure("bench", tiny_bundle, *words)
        assert message == "--compare torch needs torch: pip install 'ccam-deploy[export]'"

    @pytest.mark.slow
    def test_another_model(self, tiny_bundle: Path, tmp_path: Path) -> None:
        torch.manual_seed(1)
        other = tiny()
        torch.nn.init.normal_(other.head.weight)
        torch.save(other.state_dict(), tmp_path / "other.pt")
        words = ("--compare", "torch", "--arch", "tests.networks:tiny")
        message = failure("bench", tiny_bundle, *words, "--model", tmp_path / "other.pt")
        assert "the model's logits differ from the bundle's by" in message
        torch.save(tiny().state_dict(), tmp_path / "wide.pt")
        digits = ("--compare", "torch", "--recipe", RECIPES / "digits.toml")
        assert 'layer "' in failure("bench", tiny_bundle, *digits)


@pytest.mark.slow
def test_full_disk_leaves_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    with full_disk(100):
        message = failure("bench", tiny_bundle, *QUICK, "--output", tmp_path / "x.json")
    assert f"cannot write {tmp_path / 'x.json'}: " in message
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_model_file_for_torch(tiny_bundle: Path, tmp_path: Path) -> None:
    torch.save(tiny().state_dict(), tmp_path / "tiny.pt")
    words = ("--compare", "torch", "--arch", "tests.networks:tiny", "--json")
    done = success("bench", tiny_bundle, *QUICK, *words, "--model", tmp_path / "tiny.pt")
    assert json.loads(done.stdout)["batches"][0]["compare"]["torch"]["ratio"] > 0
    assert not torch.backends.cudnn.allow_tf32  # as little as ours, in fp32


def test_formats_of_plots_are_in_the_help() -> None:
    text = success("bench", "--help").stdout
    assert all(f".{kind}" in text for kind in plotting.PLOT_FORMATS)


def test_the_bound_is_in_the_help() -> None:
    """The figures of the help are those that the measurement keeps."""
    text = " ".join(success("bench", "--help").stdout.split())
    one = Deadlines.of(LatencySettings(duration=1.0, warmup=0.0), 0, 0.0)
    rate = one.last - FIRST_CALLS_S
    assert f"--warmup, {rate:g} times --duration and {FIRST_CALLS_S:g} seconds" in text
    assert f"{LIMIT_S:g} seconds for the cold start" in text

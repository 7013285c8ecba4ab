"""`--precision tf32`: on a GPU, which is emulated here, in every command that has the option."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import ccam_deploy as ccam
from ccam_deploy.bundle.folder import read_bundle, write_manifest
from ccam_deploy.engines import Networks
from ccam_deploy.engines import open as open_module
from ccam_deploy.engines.onnxruntime import OnnxRuntimeEngine
from ccam_deploy.engines.tensorrt import library, plans
from ccam_deploy.fidelity.tolerance import TOLERANCE, Tolerance
from tests.command import WEIGHTS, failure, success
from tests.helpers import example_pictures
from tests.networks import tiny
from tests.sweeps import nightly_but
from tests.tf32 import emulated

FLOWER = Path(ccam.__file__).parent / "examples" / "photographs" / "flower.jpg"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bool]:
    """A GPU that runs TF32 as it is emulated; whether each opening asked for it."""
    asked: list[bool] = []

    def slots(paths: Mapping[str, Path], most: int, tf32: bool = False) -> Any:
        asked.append(tf32)
        folder = tmp_path / f"gpu{len(asked)}"
        folder.mkdir()
        return SimpleNamespace(paths=emulated(paths, folder) if tf32 else paths)

    def on_slots(opened: Any, graphs: list[str], scale: float, backend: str) -> Networks:
        return Networks(
            {name: OnnxRuntimeEngine(opened.paths[name]) for name in graphs}, scale, backend
        )

    monkeypatch.setattr("ccam_deploy.engines.cuda.onnxruntime_slots.onnxruntime_slots", slots)
    monkeypatch.setattr(open_module, "_on_slots", on_slots)
    monkeypatch.setattr(open_module, "available", lambda: ["onnxruntime-cuda", "onnxruntime-cpu"])
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("backend", nightly_but(["auto"], ["auto", "onnxruntime-cuda"]))
def test_verify_measures_it_on_a_gpu(digits_bundle: Path, gpu: list[bool], backend: str) -> None:
    words = ("verify", digits_bundle, "--backend", backend)
    line, verdict = success(*words, "--precision", "tf32").stdout.splitlines()
    # The second digit depends on the CPU's instructions.
    assert re.match(r"tf32 on onnxruntime-cuda: logits 2\.\de-04, masked logits 2\.\de-04, ", line)
    assert verdict.endswith("are as exported, and the fp32 graphs keep to the bounds of tf32")
    graphs = as_json(*words, "--precision", "tf32")["graphs"]
    assert list(graphs) == ["tf32"]
    assert 1e-5 < graphs["tf32"]["logits"] < 1e-3
    exact = as_json(*words, "--precision", "fp32")["graphs"]
    assert list(exact) == ["fp32"]
    assert exact["fp32"]["logits"] < 1e-6
    assert gpu == [True, True, False]


@pytest.mark.slow
def test_verify_fails_where_tf32_is_too_far_off(
    digits_bundle: Path, tmp_path: Path, gpu: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOLERANCE, "tf32", Tolerance(masked_logits=1e-5))
    folder = shutil.copytree(digits_bundle, tmp_path / "digits")
    manifest = read_bundle(folder).manifest
    exact = dataclasses.replace(manifest.precisions["fp32"], tolerance={})
    precisions = {**manifest.precisions, "fp32": exact}
    write_manifest(folder, dataclasses.replace(manifest, precisions=precisions))
    assert re.match(
        r"the graphs do not give what was recorded: tf32: masked_logits 0\.00022\d is above 1e-05",
        failure("verify", folder, "--precision", "tf32"),
    )


def test_explanations_name_it(digits_bundle: Path, gpu: list[bool]) -> None:
    """As settings of a result; the maps are those of the graphs as they ran."""
    pictures = example_pictures()[:1]
    found = {}
    for precision in ("fp32", "tf32"):
        with ccam.load(digits_bundle, precision=precision) as explainer:
            found[precision] = explainer.explain(pictures)
    assert found["tf32"].settings["precision"] == "tf32"
    assert gpu == [False, True]
    assert 0 < np.abs(found["tf32"].logits - found["fp32"].logits).max() < 0.02


@pytest.mark.parametrize(
    "words",
    [
        ("verify",),
        ("explain", FLOWER, "--output", "out"),
        ("compare", FLOWER, "--output", "out.png"),
        ("propose", FLOWER, "--output", "out"),
        ("evaluate", "scenes", "--output", "out"),
        ("bench",),
    ],
    ids=lambda words: words[0],
)
def test_a_cpu_refuses_it(tiny_bundle: Path, here: Path, words: tuple[object, ...]) -> None:
    command, *others = words
    options = ("--backend", "onnxruntime-cpu", "--precision", "tf32")
    message = failure(command, tiny_bundle, *others, *options)
    assert message.startswith("tf32 does not run on a CPU, only on NVIDIA GPUs of compute capab")
    assert not list(here.iterdir())


@pytest.mark.slow
def test_bench_measures_it(digits_bundle: Path, here: Path, gpu: list[bool]) -> None:
    """And its process for the cold start is told of it, which this emulation does not reach."""
    started: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "ccam_deploy.latency.cold_start.measure_cold_start",
            lambda bundle, images, batch, setup: started.append(setup),
        )
        words = ("--precision", "tf32", "--duration", "0.1", "--warmup", "0", "--json")
        report = json.loads(success("bench", digits_bundle, *words).stdout)
    assert report["settings"]["precision"] == "tf32"
    assert gpu == [True]
    assert [setup["precision"] for setup in started] == ["tf32"]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Plans of a few bytes instead of TensorRT's; each graph, and whether it was to be in TF32."""
    built: list[tuple[str, bool]] = []

    def build_plan(library: library.Library, graph: Path, *others: Any) -> bytes:
        built.append((graph.stem, others[-1]))
        return f"{graph.name} {len(built)}".encode()

    monkeypatch.setattr(plans, "build_plan", build_plan)
    return built


RTX = ("--library", "tensorrt-rtx", "--device", "8.9")
GRAPHS = ("backbone", "gradient", "classifier")


def test_build_takes_it(tiny_bundle: Path, here: Path, stand_in: list[tuple[str, bool]]) -> None:
    pytest.importorskip("tensorrt_rtx")
    folder = shutil.copytree(tiny_bundle, here / "tiny")
    result = success("build", "tiny", "--precision", "tf32", *RTX, "--no-kernels")
    assert result.stderr.splitlines() == [f"building {graph} (tf32)" for graph in GRAPHS]
    assert stand_in == [(graph, True) for graph in GRAPHS]
    assert {plan.precision for plan in read_bundle(folder).manifest.plans} == {"tf32"}
    assert success("info", "tiny").stdout.count(" tf32       tensorrt-rtx ") == 3
    message = failure("build", "tiny", "--precision", "tf32", *RTX[:2], "--device", "7.5")
    assert message == "compute capability 7.5 has no TF32, which 8.0 and newer have; use fp32"


@pytest.mark.slow
def test_export_adds_plans_but_no_graphs(here: Path, stand_in: list[tuple[str, bool]]) -> None:
    pytest.importorskip("tensorrt_rtx")
    torch.save(tiny().state_dict(), here / "net.pt")
    words = ("export", "net.pt", *WEIGHTS, "--precision", "tf32", "--output")
    lines = success(*words, "plain").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["plain:", "fp32", "tf32,"]
    plain = read_bundle("plain").manifest
    assert (list(plain.precisions), plain.plans) == (["fp32"], ())
    success(*words, "built", "--build", *RTX, "--no-kernels")
    built = read_bundle("built").manifest
    assert stand_in == [(graph, tf32) for tf32 in (False, True) for graph in GRAPHS]
    assert list(built.precisions) == ["fp32"]
    assert [plan.precision for plan in built.plans] == ["fp32"] * 3 + ["tf32"] * 3
    assert {n for n in built.files if not n.startswith("plans/")} == set(plain.files)


def as_json(*words: object) -> Any:
    return json.loads(success(*words, "--json").stdout)

"""`build` and `export --build`: what they print, keep and refuse."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ccam_deploy.bundle.folder import read_bundle, unlisted_files
from ccam_deploy.engines.tensorrt import library, plans
from ccam_deploy.errors import BackendError
from ccam_deploy.kernels.cuda import ahead, bundled
from ccam_deploy.kernels.cuda.kernel_files import Code, Codes
from tests.command import SCRIPT, WEIGHTS, failure, success
from tests.networks import tiny

pytest.importorskip("tensorrt_rtx")

WITH_KERNELS = ["--library", "tensorrt-rtx", "--device", "8.9", "--max-batch", "2"]
RTX = [*WITH_KERNELS, "--no-kernels"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a bundle, `tiny`, and the weights that it was exported from."""
    monkeypatch.chdir(tmp_path)
    torch.save(tiny().state_dict(), tmp_path / "net.pt")
    return tmp_path


@pytest.fixture
def bundle(here: Path, tiny_bundle: Path) -> Path:
    return shutil.copytree(tiny_bundle, here / "tiny").relative_to(here)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Plans of a few bytes instead of TensorRT's; the graphs that were built, in order."""
    built: list[str] = []

    def build_plan(library: library.Library, graph: Path, *others: object) -> bytes:
        built.append(graph.name)
        return f"{graph.name} {len(built)}".encode()

    monkeypatch.setattr(plans, "build_plan", build_plan)
    return built


@pytest.mark.slow
def test_plans_are_built_once(bundle: Path) -> None:
    result = success("build", bundle, *RTX)
    version = library.load_library("tensorrt-rtx").version
    pattern = rf"tiny/plans/8\.9-tensorrt-rtx-{re.escape(version)}-fp32-\w{{8}}/(\w+)\.plan: "
    names = [re.match(pattern + r"\d+\.\d MB for 8\.9$", x) for x in result.stdout.splitlines()]
    graphs = ["backbone", "gradient", "classifier"]
    assert [match and match[1] for match in names] == graphs
    assert result.stderr.splitlines() == [f"building {graph} (fp32)" for graph in graphs]
    again = success("build", bundle, *RTX)
    assert again.stdout == f"tiny: the fp32 plans for TensorRT-RTX {version} are up to date\n"
    assert not again.stderr
    table = success("info", bundle).stdout
    assert len(re.findall(rf"fp32 +tensorrt-rtx {re.escape(version)} +8\.9 +2$", table, re.M)) == 3


def test_a_signature_goes_when_the_bundle_changes(bundle: Path, stand_in: list[str]) -> None:
    signature = bundle / "model.sig"
    signature.touch()
    told = "the bundle has changed, so its signature was removed; sign it again"
    assert success("build", bundle, *RTX).stderr.splitlines()[-1] == told
    assert not signature.exists()
    signature.touch()
    assert told not in success("build", bundle, *RTX).stderr
    assert signature.exists()


def test_json(bundle: Path, stand_in: list[str]) -> None:
    first = json.loads(success("build", bundle, *RTX, "--json").stdout)
    assert (first["bundle"], first["up_to_date"]) == ("tiny", False)
    assert [plan["graph"] for plan in first["plans"]] == ["backbone", "gradient", "classifier"]
    again = json.loads(success("build", bundle, *RTX, "--json").stdout)
    assert again == {**first, "up_to_date": True}
    assert len(stand_in) == 3


def test_kernels_come_with_the_plans(
    bundle: Path, stand_in: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba.cuda")
    compiled: list[str] = []

    def compile_kernels(device: str, dtypes: list[str], progress: ahead.Progress) -> Codes:
        compiled.append(device)
        progress(0.5, "merge")
        return {f"{name} {len(compiled)}": Code("entry", False, b"code") for name in dtypes}

    monkeypatch.setattr(bundled, "compile_kernels", compile_kernels)
    result = success("build", bundle, *WITH_KERNELS)
    assert result.stderr.splitlines()[-1] == "building kernels (8.9)"
    *_, line = result.stdout.splitlines()
    assert re.fullmatch(r"tiny/kernels/8\.9-\w{8}\.kernels: 0\.0 MB for 8\.9", line)
    again = json.loads(success("build", bundle, *WITH_KERNELS, "--json").stdout)
    assert again["up_to_date"] is True
    assert [code["device"] for code in again["kernels"]] == ["8.9"]
    assert compiled == ["8.9"]
    assert re.search(r"^numba-cuda \S+ numba \S+ +8\.9$", success("info", bundle).stdout, re.M)
    forced = json.loads(success("build", bundle, *WITH_KERNELS, "--force", "--json").stdout)
    assert forced["up_to_date"] is False
    assert compiled == ["8.9", "8.9"]
    assert not unlisted_files(read_bundle(bundle))


def test_plans_are_kept_where_kernels_cannot_be_compiled(
    bundle: Path, stand_in: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "source_digest", lambda: "")
    result = success("build", bundle, *WITH_KERNELS)
    *_, note = result.stderr.splitlines()
    assert note.startswith(
        "the bundle has plans but no compiled kernels: numba-cuda is not installed: pip install"
    )
    assert len(read_bundle(bundle).manifest.plans) == 3
    assert json.loads(success("build", bundle, *WITH_KERNELS, "--json").stdout)["kernels"] == []


def test_force_builds_anyway(bundle: Path, stand_in: list[str]) -> None:
    for count, words in ((3, []), (3, []), (6, ["--force"]), (6, []), (9, ["--max-batch", "4"])):
        success("build", bundle, *RTX, *words)
        assert len(stand_in) == count
    assert len(read_bundle(bundle).manifest.plans) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "1.0"], "tensorrt-rtx does not support compute capability 1.0; it supports"),
        (["--max-batch", "0"], "'--max-batch': 0 is not in the range x>=1. See ccam-deploy build"),
        (["--timing-cache", "times.bin"], "tensorrt-rtx has no timing cache, it measures nothing"),
        (["--timing-cache", "tiny"], "'--timing-cache': File 'tiny' is a directory"),
        (["--precision", "fp16"], "the bundle has no fp16 graphs, only fp32; export with"),
    ],
)
def test_bad_options(bundle: Path, words: list[str], message: str) -> None:
    assert message in failure("build", bundle, *RTX, *words)
    assert not read_bundle(bundle).manifest.plans
    assert not unlisted_files(read_bundle(bundle))


@pytest.mark.slow
def test_the_progress_on_a_terminal(bundle: Path) -> None:
    """A bar that ends full, and the phases of TensorRT beside it; nothing of it on stdout."""
    ours, theirs = pty.openpty()
    words = [str(SCRIPT), "build", str(bundle), *RTX]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=theirs, text=True) as running:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # how Linux says that the other end was closed
            pass
        assert running.stdout is not None
        assert "building" not in running.stdout.read()
    os.close(ours)
    assert running.returncode == 0
    for graph in ("backbone", "gradient", "classifier"):
        assert re.search(rf"building {graph} \(fp32\)  \[#+\]  100%", shown.decode())
    assert re.search(r"\d+%  Building engine", shown.decode())


@pytest.mark.slow
def test_interrupting_a_build_leaves_the_bundle_as_it_was(
    digits_bundle: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(digits_bundle, tmp_path / "digits")
    code = (
        "import signal; from ccam_deploy.cli.main import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler); main()\n"
    )
    command = [sys.executable, "-c", code, "build", str(folder), *RTX]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        assert running.stderr.readline() == "building backbone (fp32)\n"
        running.send_signal(signal.SIGINT)
        rest = running.stderr.read()
    assert running.returncode == 2
    assert rest.endswith("error: interrupted; nothing was left half-written\n")
    assert not unlisted_files(read_bundle(folder))
    assert not read_bundle(folder).manifest.plans


@pytest.mark.slow
def test_export_builds_every_precision(here: Path, stand_in: list[str]) -> None:
    words = ["export", "net.pt", *WEIGHTS, "--precision", "fp16", "--output", "out", "--build"]
    result = success(*words, *RTX)
    names = ("backbone", "gradient", "classifier")
    assert stand_in == [f"{name}{half}.onnx" for half in ("", ".fp16") for name in names]
    first, *_ = result.stdout.splitlines()
    assert first == "out: 5 classes, layers relu1, relu2"
    assert result.stdout.count(" MB for 8.9\n") == 6
    made = read_bundle("out").manifest.plans
    assert [(p.precision, p.max_batch, p.devices) for p in made] == [
        (precision, 2, ("8.9",)) for precision in ("fp32", "fp16") for _ in names
    ]


@pytest.mark.slow
def test_export_and_build_as_json(here: Path, stand_in: list[str]) -> None:
    words = ["export", "net.pt", *WEIGHTS, "--output", "out", "--build", *RTX, "--json"]
    report = json.loads(success(*words).stdout)
    assert len(report["manifest"]["plans"]) == 3
    assert report["manifest"]["digest"] == read_bundle("out").manifest.digest


@pytest.mark.slow
def test_a_failed_build_leaves_the_exported_bundle(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rejects(library: library.Library, graph: Path, *others: object) -> bytes:
        raise BackendError(f"{library.flavour} rejects {graph.name}: no such operator")

    monkeypatch.setattr(plans, "build_plan", rejects)
    words = ["export", "net.pt", *WEIGHTS, "--output", "out", "--build", *RTX]
    assert failure(*words) == (
        "out was exported, but its fp32 plans were not built: "
        "tensorrt-rtx rejects backbone.onnx: no such operator"
    )
    exported = read_bundle("out")
    assert not exported.manifest.plans
    assert not unlisted_files(exported)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--library", "tensorrt"], "--library goes with --build"),
        (["--max-batch", "8"], "--max-batch goes with --build"),
        (["--device", "8.9"], "--device goes with --build"),
        (["--timing-cache", "times.bin"], "--timing-cache goes with --build"),
        (["--no-kernels"], "--kernels goes with --build"),
        (
            ["--build", "--library", "tensorrt-rtx", "--device", "1.0"],
            "tensorrt-rtx does not support compute capability 1.0",
        ),
        (
            ["--build", "--library", "tensorrt-rtx", "--timing-cache", "times.bin"],
            "tensorrt-rtx has no timing cache",
        ),
        (
            ["--precision", "fp8", "--build", "--library", "tensorrt-rtx", "--device", "8.6"],
            "compute capability 8.6 has no FP8",
        ),
    ],
)
def test_bad_build_options_are_found_before_the_export(
    here: Path, words: list[str], message: str
) -> None:
    assert message in failure("export", "net.pt", *WEIGHTS, "--output", "out", *words)
    assert [path.name for path in here.iterdir()] == ["net.pt"]

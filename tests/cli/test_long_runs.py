"""A long run that is told to end does so in one line, with whole files, and what was done kept."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image

from ccam_deploy.bundle.folder import read_bundle, unlisted_files
from tests.command import success
from tests.helpers import ROOT, SCENES
from tests.networks import tiny
from tests.sweeps import nightly_but

pytestmark = pytest.mark.slow

LINE = "error: terminated; nothing was left half-written"
PATIENCE_S = 120


@dataclass
class Ended:
    """A command that was told to end.

    Attributes:
        code: Its exit code.
        lines: What it printed on stderr.
        orphans: Processes that it started and that outlived it.
    """

    code: int
    lines: list[str]
    orphans: list[psutil.Process]


@contextmanager
def running(*words: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "ccam_deploy", *map(str, words)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def end(process: subprocess.Popen[str], told: str = "") -> Ended:
    """Send SIGTERM, and collect what follows."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=PATIENCE_S)
    _, orphans = psutil.wait_procs(children, timeout=5)
    return Ended(process.returncode, (told + rest).splitlines(), orphans)


def end_at_line(start: str, *words: object) -> Ended:
    """End a command right after it printed a line on stderr that starts so."""
    with running(*words) as process:
        assert process.stderr is not None
        told = ""
        while not (line := process.stderr.readline()).startswith(start):
            assert line, f"the command ended before it printed {start}: {told}"
            told += line
        return end(process, told + line)


def end_when(reached: Callable[[], object], *words: object) -> Ended:
    """End a command once something is so."""
    with running(*words) as process:
        before = time.monotonic()
        while not reached():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < before + PATIENCE_S
            time.sleep(0.01)
        return end(process)


def assert_clean(ended: Ended, *folders: Path) -> None:
    assert (ended.code, ended.lines[-1]) == (128 + signal.SIGTERM, LINE), ended.lines
    assert sum(line.startswith("error: ") for line in ended.lines) == 1
    assert not any("Traceback" in line for line in ended.lines)
    assert not ended.orphans
    hidden = [path for folder in folders for path in folder.rglob(".*")]
    assert not hidden


@pytest.mark.parametrize("graph", nightly_but(["gradient"], ["backbone", "gradient", "classifier"]))
def test_build(digits_bundle: Path, tmp_path: Path, graph: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    folder = shutil.copytree(digits_bundle, tmp_path / "digits")
    words = ("build", folder, "--library", "tensorrt-rtx", "--device", "8.9", "--no-kernels")
    assert_clean(end_at_line(f"building {graph}", *words), tmp_path)
    bundle = read_bundle(folder)
    assert not bundle.manifest.plans
    assert not unlisted_files(bundle)


def test_build_keeps_the_plans_while_kernels_are_compiled(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    pytest.importorskip("numba.cuda", reason="numba-cuda is not installed")
    folder = shutil.copytree(tiny_bundle, tmp_path / "tiny")
    words = ("build", folder, "--library", "tensorrt-rtx", "--device", "8.9")
    assert_clean(end_at_line("building kernels", *words), tmp_path)
    bundle = read_bundle(folder)
    assert len(bundle.manifest.plans) == 3
    assert not bundle.manifest.compiled
    assert not unlisted_files(bundle)


def test_evaluate_goes_on_where_it_ended(digits_bundle: Path, tmp_path: Path) -> None:
    """The rows are those of a run that nobody ended, and none is measured twice."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    words: list[object] = ["evaluate", digits_bundle, "scenes", "--limit", 8, "--batch-size", 1]
    words += ["--metrics", "average-drop,deletion", "--no-plots", "--output"]
    ended, whole = tmp_path / "ended", tmp_path / "whole"
    results = ended / "results.csv"
    assert_clean(end_when(lambda: rows(results) >= 2, *words, ended), tmp_path)
    done = rows(results)
    assert 2 <= done < 8
    assert f"continuing after {done} of 8 rows" in success(*words, ended).stderr
    success(*words, whole)
    assert results.read_bytes() == (whole / "results.csv").read_bytes()
    summaries = [json.loads((at / "summary.json").read_text()) for at in (ended, whole)]
    assert summaries[0] == summaries[1]


def rows(path: Path) -> int:
    """How many whole rows a file of results has."""
    if not path.exists():
        return 0
    with path.open(newline="") as file:
        return max(sum(1 for _ in csv.reader(file)) - 1, 0)


def test_propose(digits_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("cv2", reason="opencv-contrib-python-headless is not installed")
    many = tmp_path / "many"
    for number in range(12):
        shutil.copytree(SCENES, many / str(number))
    output = tmp_path / "out"
    words = ("propose", digits_bundle, many, "--output", output)
    ended = end_when(lambda: output.is_dir() and len(list(output.glob("*.png"))) > 1, *words)
    assert_clean(ended, tmp_path)
    pictures = list(output.iterdir())
    assert len(pictures) >= 2
    for picture in pictures:
        with Image.open(picture) as opened:
            opened.load()


@pytest.mark.parametrize("seconds", nightly_but([0.5], [0.5, 2.0]))
def test_sanity(tmp_path: Path, seconds: float) -> None:
    """Whenever: nothing is written before the end."""
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    weights = tmp_path / "tiny.pt"
    torch.save(tiny().state_dict(), weights)
    words: list[Any] = ["sanity", weights, "--arch", "tests.networks:tiny"]
    words += ["--input-size", "224x224", "--output", tmp_path / "out"]
    with running(*words) as process:
        wait_for_library(process, "torch")
        time.sleep(seconds)
        ended = end(process)
    assert_clean(ended, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.pt"]


def wait_for_library(process: subprocess.Popen[str], name: str) -> None:
    """Wait until a process has loaded a library: it is at work by then."""
    before = time.monotonic()
    while not any(
        f"lib{name}" in entry.path for entry in psutil.Process(process.pid).memory_maps()
    ):
        assert process.poll() is None
        assert time.monotonic() < before + PATIENCE_S
        time.sleep(0.05)


@pytest.mark.parametrize(
    "line",
    nightly_but(["batch 1: cold start"], ["loading", "batch 1: cold start", "batch 1: warming up"]),
)
def test_bench(digits_bundle: Path, tmp_path: Path, line: str) -> None:
    report = tmp_path / "report.json"
    words = ("bench", digits_bundle, SCENES, "--limit", 1, "--concurrency", 2, "--output", report)
    assert_clean(end_at_line(line, *words), tmp_path)
    assert not report.exists()

"""`ccam-deploy evaluate`: what it writes, that it goes on, and one line for what goes wrong."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

import ccam_deploy as ccam
from ccam_deploy.arrays import Floats
from ccam_deploy.cli import evaluate as command
from ccam_deploy.explanation import Explanation
from ccam_deploy.files import kept_from_others
from ccam_deploy.quality import metrics
from ccam_deploy.quality.variants import Variant
from tests.command import failure, refusal, run, success
from tests.quality.layouts import image_folder, picture

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

FILES = {
    "settings.json",
    "results.csv",
    "summary.json",
    "summary.md",
    "report.html",
    "curves.png",
    "maps.png",
}


@pytest.fixture(scope="module")
def written(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small evaluation in groups of four with everything at its default."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder = tmp_path_factory.mktemp("evaluate") / "sub" / "found"
    done = success(
        *("evaluate", digits_bundle, "scenes", "--limit", 6, "--batch-size", 4),
        *("--output", folder),
    )
    assert done.stdout == (folder / "summary.md").read_text()
    assert str(folder) in done.stderr
    return folder


@pytest.mark.slow
def test_everything_is_written(written: Path) -> None:
    assert {path.name for path in written.iterdir()} == FILES
    with (written / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    found = json.loads((written / "summary.json").read_text())
    assert list(found["results"]["collection-cam"]) == list(metrics.METRICS)
    for name, estimate in found["results"]["collection-cam"].items():
        values = [float(row[name]) for row in rows]
        assert estimate["mean"] == pytest.approx(sum(values) / 6)
        assert estimate["low"] <= estimate["mean"] <= estimate["high"]
        assert estimate["images"] == 6
    assert found["settings"] == json.loads((written / "settings.json").read_text())
    assert found["settings"]["batch_size"] == 4
    page = (written / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2


@pytest.mark.slow
def test_a_second_run_changes_nothing(written: Path, digits_bundle: Path) -> None:
    before = {path.name: path.read_bytes() for path in written.iterdir()}
    done = success(
        *("evaluate", digits_bundle, "scenes", "--limit", 6, "--batch-size", 4),
        *("--output", written, "--json"),
    )
    assert "continuing after 6 of 6 rows" in done.stderr
    assert {path.name: path.read_bytes() for path in written.iterdir()} == before
    assert json.loads(done.stdout) == json.loads(before["summary.json"])


def test_other_settings_are_refused(written: Path, digits_bundle: Path) -> None:
    words = ("evaluate", digits_bundle, "scenes", "--batch-size", 4, "--output", written)
    line = failure(*words, "--limit", 6, "--seed", 1)
    assert line == (
        f"{written} holds an evaluation with seed 0, and this command has 1; to continue it, give "
        "the options that it was begun with; to begin another, give another --output"
    )
    line = failure(*words, "--limit", 7)
    assert f"{written} holds an evaluation of 6 images, and this command asks for 7; to" in line
    line = failure(*words, "--limit", 6, "--methods", "grad-cam,collection-cam")
    assert "with methods collection-cam, and this command has grad-cam, collection-cam; to" in line
    line = failure(*words, "--limit", 6, "--option", "k_max=4")
    assert "with methods.collection-cam.options.k_max 10, and this command has 4; to" in line
    assert "holds an evaluation of other images; to continue" in failure(
        *words, "--limit", 6, "--split", "train"
    )


def test_two_runs_do_not_write_at_once(digits_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "evaluation"
    words = ("evaluate", digits_bundle, "scenes", "--limit", 1, "--no-plots", "--output", output)
    with kept_from_others(output, ""):
        line = f"another evaluation writes to {output}; wait for it, or give another --output"
        assert refusal(run(*words)) == line


@pytest.mark.slow
def test_interrupt_and_go_on(
    digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second group; the rerun ends with what an unbroken run writes."""
    plain = Variant.explain
    calls = []

    def broken(
        self: Variant, explainer: ccam.Explainer, images: Floats, targets: list[int]
    ) -> Explanation:
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, explainer, images, targets)

    words: tuple[object, ...] = ("evaluate", digits_bundle, "scenes", "--limit", 5)
    words += ("--batch-size", 2, "--no-plots", "--metrics", "average-drop,proportion")
    success(*words, "--output", tmp_path / "whole")
    monkeypatch.setattr(Variant, "explain", broken)
    stopped = run(*words, "--output", tmp_path / "broken")
    assert refusal(stopped) == "interrupted; nothing was left half-written"
    assert "2 of 5 rows are in" in stopped.stderr
    assert {path.name for path in (tmp_path / "broken").iterdir()} == {
        "settings.json",
        "results.csv",
    }
    done = success(*words, "--output", tmp_path / "broken")
    assert calls == [2, 2, 2, 1]
    assert "continuing after 2 of 5 rows" in done.stderr
    for name in FILES - {"curves.png", "maps.png"}:
        one, other = ((tmp_path / run / name).read_bytes() for run in ("whole", "broken"))
        assert one == other, name


@pytest.mark.slow
def test_images_that_cannot_be_read_are_passed_over(digits_bundle: Path, tmp_path: Path) -> None:
    """In any place of a group; every file counts the others alone, and a rerun ends the same."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    root = image_folder(tmp_path / "data", ["3", "7"], each=2)
    broken = root / "3" / "00.png"
    broken.write_text("no image")
    small = picture(root / "7" / "2.png", 0, (7, 30))
    metric_words = ("--metrics", "average-drop,deletion", "--batch-size", 2)
    words = ("evaluate", digits_bundle, root, *metric_words, "--output", tmp_path / "out")
    done = run(*words)
    assert done.exit_code == 2
    first, second = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert first.startswith(f"error: 3/00.png: {broken} is not an image")
    assert second == f"error: 7/2.png: {small} is 7x30; both sides must be at least 8"
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found["unread"] == ["3/00.png", "7/2.png"]
    assert {e["images"] for e in found["results"]["collection-cam"].values()} == {4}
    assert len(found["curves"]["collection-cam"]["deletion"]) > 2
    assert "over 4 images of" in done.stdout
    assert "without 2 more that could not be read" in done.stdout
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    again = run(*words)
    assert (again.exit_code, again.stdout) == (2, done.stdout)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    for path in root.rglob("*.png"):
        path.write_text("no image")
    stopped = run(*words[:-1], tmp_path / "none")
    assert stopped.exit_code == 2
    assert stopped.stderr.splitlines()[-1] == f"error: no image of {root} could be read"


def test_options_reach_the_measurement(digits_bundle: Path, tmp_path: Path) -> None:
    """A folder without boxes, the label explained, RISE's protocol, chosen metrics."""
    root = image_folder(tmp_path / "data", ["3", "7"], each=1)
    done = success(
        *("evaluate", digits_bundle, root, "--explain-class", "label", "--protocol", "rise"),
        *("--metrics", "insertion, average-drop", "--methods", "collection-cam,grad-cam,grad-cam"),
        *("--option", "k_max=4", "--option", "grad-cam:relu=false"),
        *("--precision", "fp16", "--threads", 1, "--backend", "onnxruntime-cpu", "--seed", 5),
        *("--no-plots", "--json", "--output", tmp_path / "out"),
    )
    found = json.loads(done.stdout)
    assert found["settings"]["metrics"] == ["average-drop", "insertion"]
    assert found["settings"]["precision"] == "fp16"
    assert found["settings"]["seed"] == 5
    chosen = found["settings"]["methods"]
    assert list(chosen) == ["collection-cam", "grad-cam"]
    assert chosen["collection-cam"]["options"]["theta"] == 0.1
    assert chosen["collection-cam"]["options"]["k_max"] == 4
    assert chosen["grad-cam"] == {"method": "grad-cam", "options": {"layer": "", "relu": False}}
    assert "blurred" in found["protocol"]
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        assert [(row["name"], row["target"]) for row in csv.DictReader(file)] == [
            ("3/0.png", "3"),
            ("7/0.png", "7"),
        ] * 2
    assert "base64" not in (tmp_path / "out" / "report.html").read_text()


def test_bad_words_are_one_line(digits_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (tmp_path / "file").write_text("")
    data = picture(tmp_path / "data" / "a.png", 0).parent
    for words, message in (
        (("scenes", "--methods", "x-cam"), 'method "x-cam" is unknown; there are collection-cam'),
        (("scenes", "--methods", ","), '"," names nothing'),
        (("scenes", "--option", "depth=3"), 'option "depth" is unknown; collection-cam has'),
        (("scenes", "--metrics", "road"), 'metric "road" is unknown; there are average-drop'),
        (("scenes", "--protocol", "mine"), "'mine' is not one of 'paper', 'rise'"),
        (("coco",), 'data set "coco" is neither a folder nor known; there are scenes,'),
        (("imagenet:nowhere",), "nowhere is not ImageNet: there is no such folder"),
        ((data, "--split", "test"), "has no split; scenes and cub have"),
        ((data, "--metrics", "pointing"), "pointing needs boxes"),
        ((data, "--explain-class", "label"), "the data set has no classes to explain"),
        (("scenes", "--limit", 0), "0 is not in the range x>=1"),
    ):
        assert message in failure("evaluate", digits_bundle, *words, "--output", output)
    assert not output.exists()
    assert "file" in failure("evaluate", digits_bundle, "scenes", "--output", tmp_path / "file")
    line = failure("evaluate", digits_bundle, "scenes", "--output", tmp_path / "file" / "sub")
    assert "cannot write" in line
    assert "is not a bundle" in failure("evaluate", tmp_path, "scenes", "--output", output)


def test_methods_that_cannot_run_are_told_first(digits_bundle: Path, tmp_path: Path) -> None:
    """All of them in one line, with what to export, before anything is written."""
    output = tmp_path / "out"
    names = "collection-cam,recipro-cam,smoothgrad,grad-cam,integrated-gradients,guided-backprop"
    words = ("evaluate", digits_bundle, "scenes", "--limit", 1, "--methods", names)
    assert failure(*words, "--output", output) == (
        "some methods cannot run here: "
        "recipro-cam (the bundle has no head graph; export it with --head), "
        "smoothgrad, integrated-gradients "
        "(the bundle has no input_gradient graph; export it with --gradients), "
        "guided-backprop (the bundle has no guided_gradient graph; export it with --gradients)"
    )
    assert not output.exists()


def test_missing_matplotlib_is_said_before_measuring(
    digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = ("evaluate", digits_bundle, "scenes", "--limit", 1, "--output", tmp_path / "out")
    assert "pip install 'ccam-deploy[plot]'" in failure(*words)
    assert not (tmp_path / "out").exists()
    success(*words, "--no-plots")


def test_help_repeats_what_the_package_has() -> None:
    assert tuple(metrics.METRICS) == command.METRICS
    assert tuple(metrics.PROTOCOLS) == command.PROTOCOLS

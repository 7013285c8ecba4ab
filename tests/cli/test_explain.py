"""`ccam-deploy explain`: images and classes in, lines and files out."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ccam_deploy.cli.main import main
from ccam_deploy.explanation import Explanation
from tests.cli.files import picture, tree
from tests.command import SCRIPT, failure, refusal, run, success
from tests.damage import full_disk
from tests.helpers import example_files

LINE = re.compile(r"(\S+): class (\w+), probability (0\.\d{3}), masks \d+\+\d+, \d+\.\d ms")


def test_explain_writes_what_was_asked_for(tiny_bundle: Path, here: Path) -> None:
    picture(here / "one.png")
    words = ["explain", tiny_bundle, "one.png", "--target", "cat"]
    result = success(*words, "--save", "overlay,heatmap, panel,masks,npz,json")
    first, *written = result.stdout.splitlines()
    matched = LINE.fullmatch(first)
    assert matched
    assert (matched[1], matched[2]) == ("one.png", "cat")
    stem = "explanations/one-cat"
    kinds = ("overlay.png", "heatmap.png", "masks.png", "npz", "json")
    expected = [f"{stem}.{kind}" for kind in kinds] + ["explanations/one-panel.png"]
    assert [line.strip() for line in written] == expected
    assert result.stderr == ""
    for kind in ("overlay", "heatmap"):
        with Image.open(f"{stem}.{kind}.png") as shown:
            assert shown.size == (40, 30)
    with np.load(f"{stem}.npz") as arrays:
        assert arrays["saliency"].shape == (32, 48)
        assert arrays["original"].shape == (30, 40)
        assert len(arrays["masks"]) == len(arrays["weights"]) == len(arrays["mic"])
        assert set(arrays) > {"labels.relu1", "quality.relu2", "logits", "raw_saliency"}
    content = json.loads(Path(f"{stem}.json").read_text())
    assert (content["class"], content["target"]) == ("cat", 2)
    assert f"{content['probability']:.3f}" == matched[3]
    assert content["settings"]["options"]["theta"] == 0.1


def test_explain_folders_classes_and_options(tiny_bundle: Path, here: Path) -> None:
    """Equal names get numbers: of files in several folders, and of classes."""
    for index, name in enumerate(("a/x.png", "a/x-2.png", "b/x.png")):
        Path(name).parent.mkdir(exist_ok=True)
        picture(here / name, seed=index)
    words = ["explain", tiny_bundle, "a", "b/x.png", "--target", "top5", "--output", "out"]
    words += ["--option", "theta=0.3", "--option", "k_max=3", "--json", "--save", "json"]
    lines = json.loads(success(*words).stdout)
    names = ["ant", "bee", "cat", "dog-3", "dog-4"]
    expected = {f"{stem}-{name}.json" for stem in ("x", "x-2", "x-3") for name in names}
    assert set(tree(here / "out")) == expected
    assert [line["file"] for line in lines[::5]] == ["a/x-2.png", "a/x.png", "b/x.png"]
    assert sum(line["probability"] for line in lines[:5]) == pytest.approx(1)
    assert all(set(line["masks"]) == {"relu1", "relu2"} for line in lines)
    assert all(2 <= count <= 3 for line in lines for count in line["masks"].values())
    for line in lines:
        content = json.loads(Path(line["files"][0]).read_text())
        assert (content["target"], content["file"]) == (line["target"], line["file"])
        assert content["settings"]["options"]["theta"] == 0.3


def test_explain_by_another_method(tiny_bundle: Path, here: Path) -> None:
    """One without masks has none to count; all kinds of files are written."""
    picture(here / "one.png")
    words = ["explain", tiny_bundle, "one.png", "--target", "cat", "--method", "layer-cam"]
    words += ["--option", "layers=relu2, relu1", "--option", "gamma=3"]
    assert failure(*words, "--save", "overlay,masks") == (
        "method layer-cam keeps no masks to draw; collection-cam does"
    )
    line, *written = success(*words, "--save", "overlay,panel,npz,json").stdout.splitlines()
    assert re.fullmatch(r"one\.png: class cat, probability 0\.\d{3}, \d+\.\d ms", line)
    assert len(written) == 4
    content = json.loads(Path("explanations/one-cat-layer-cam.json").read_text())
    assert content["settings"]["method"] == "layer-cam"
    expected = {"layers": ["relu2", "relu1"], "relu": True, "scaling": "shallow", "gamma": 3.0}
    assert content["settings"]["options"] == expected
    assert content["weights"] == content["mic"] == []
    with np.load("explanations/one-cat-layer-cam.npz") as arrays:
        assert arrays["masks"].shape == (0, 32, 48)
        assert arrays["saliency"].max() == 1


def test_explain_within_a_budget(tiny_bundle: Path, here: Path) -> None:
    """Images go one by one; each line ends with the k_max that there was time for."""
    picture(here / "a.png")
    picture(here / "b.png", seed=1)
    words = ["explain", tiny_bundle, "a.png", "b.png", "--save", "json", "--budget-ms"]
    result = success(*words, 60_000, "--option", "k_max=4")
    assert result.stderr == "measuring what an explanation costs here\n"
    lines = [line for line in result.stdout.splitlines() if line[0] != " "]
    assert [line.split(":")[0] for line in lines] == ["a.png", "b.png"]
    for line in lines:
        assert re.fullmatch(LINE.pattern + ", k_max 4 for 60000 ms", line)
    (file,) = (here / "explanations").glob("a-*.json")
    settings = json.loads(file.read_text())["settings"]
    assert settings["options"]["k_max"] == settings["budget"]["k_max"] == 4
    reports = json.loads(success(*words, 60_000, "--target", "top2", "--json").stdout)
    assert [report["file"] for report in reports] == ["a.png", "a.png", "b.png", "b.png"]
    for report in reports:
        assert 0 < report["budget"]["predicted_ms"] < 60_000
        assert (report["budget"]["k_max"], report["budget"]["k_max_asked"]) == (10, 10)
    shutil.rmtree(here / "explanations")
    message = r"budget_ms is 0\.001; with k_max 2, the least, this call is expected to take .+ ms"
    assert re.fullmatch(message, failure(*words, 0.001))
    message = "a budget is kept by collection-cam alone; the method is rise"
    assert failure(*words, 50, "--method", "rise") == message
    assert "0 is not in the range x>0" in failure(*words, 0)
    assert tree(here) == ["a.png", "b.png"]


@pytest.mark.parametrize(("target", "classes"), [("top1", 1), ("top3", 3), ("cat", 2), ("4", 4)])
def test_targets(tiny_bundle: Path, here: Path, target: str, classes: int) -> None:
    picture(here / "one.png")
    words = ["explain", tiny_bundle, "one.png", "--target", target, "--save", "none", "--json"]
    lines = json.loads(success(*words).stdout)
    if target.startswith("top"):
        logits = [line["logit"] for line in lines]
        assert len(logits) == classes
        assert logits == sorted(logits, reverse=True)
    else:
        assert [line["target"] for line in lines] == [classes]
    assert tree(here) == ["one.png"]


@pytest.mark.parametrize("words", [["cat", "4"], ["top2", "cat"]])
def test_several_targets(tiny_bundle: Path, here: Path, words: list[str]) -> None:
    picture(here / "one.png")
    both = [part for word in words for part in ("--target", word)]
    command = ["explain", tiny_bundle, "one.png", "--save", "none", "--json"]
    found = [line["target"] for line in json.loads(success(*command, *both).stdout)]
    best = [line["target"] for line in json.loads(success(*command, "--target", "top2").stdout)]
    assert found == ([2, 4] if words[0] == "cat" else list(dict.fromkeys([*best, 2])))


def test_a_good_and_a_bad_image(tiny_bundle: Path, here: Path) -> None:
    picture(here / "good.png")
    (here / "bad.png").write_bytes((here / "good.png").read_bytes()[:900])
    Image.fromarray(np.full((20, 20), np.nan, np.float32)).save(here / "nan.tif")
    result = run("explain", tiny_bundle, "bad.png", "good.png")
    assert refusal(result).startswith("bad.png cannot be decoded: ")
    assert result.stdout.startswith("good.png: class ")
    (written,) = tree(here / "explanations")
    assert re.fullmatch(r"good-[a-z]+(-\d)?\.overlay\.png", written)
    result = run("explain", tiny_bundle, "nan.tif", "good.png", "--save", "none")
    assert refusal(result) == "nan.tif: the image has NaN or infinite pixels"
    assert result.stdout.startswith("good.png: class ")
    Image.new("1", (3_000_000, 8)).save(here / "narrow.png")
    result = run("explain", tiny_bundle, "narrow.png", "good.png", "--save", "none")
    assert refusal(result).startswith("narrow.png: the image is 3000000x8, too long and narrow")
    assert result.stdout.startswith("good.png: class ")


@pytest.mark.slow
def test_large_maps_are_shrunk_and_made_once(
    tiny_bundle: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many kinds of files show them."""
    asked: list[int] = []
    plain = Explanation.on_original

    def counting(result: Explanation, pair: int) -> Any:
        asked.append(pair)
        return plain(result, pair)

    monkeypatch.setattr(Explanation, "on_original", counting)
    picture(here / "one.png", (1500, 1000))
    words = ["explain", tiny_bundle, "one.png", "--target", "top2", "--save"]
    lines = json.loads(success(*words, "overlay,heatmap,npz,panel,json", "--json").stdout)
    assert asked == [0, 1]
    for file in lines[0]["files"][:2]:
        with Image.open(file) as shown:
            assert shown.size == (1024, 683)
    with np.load(lines[0]["files"][2]) as arrays:
        assert arrays["original"].shape == (1000, 1500)
    success(*words, "json")
    assert asked == [0, 1]


def test_full_disk_while_explaining(tiny_bundle: Path, here: Path) -> None:
    picture(here / "one.png")
    with full_disk(500):
        result = run("explain", tiny_bundle, "one.png")
    assert re.fullmatch(
        r"cannot write explanations/one-[\w-]+\.overlay\.png: File too large", refusal(result)
    )
    assert tree(here) == ["explanations", "one.png"]


@pytest.mark.slow
def test_the_examples_in_one_process(digits_bundle: Path, here: Path) -> None:
    """The installed command, on the trained example and its own images."""
    files = example_files()[:2]
    words = [SCRIPT, "explain", digits_bundle, *files, "--precision", "fp16"]
    command = [str(word) for word in words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(tree(here / "explanations")) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--option", "k_max=99999999999"],
            "k_max is 99999999999; it must be at most 1024",
        ),
        (["--option", "theta=2"], "theta is 2.0; it must be in [0, 1)"),
        (["--threads", "100000"], "threads is 100000; it must be 0 to 1024"),
    ],
)
def test_values_out_of_range_are_named_with_their_range(
    tiny_bundle: Path, words: list[str], message: str
) -> None:
    done = CliRunner().invoke(main, ["explain", str(tiny_bundle), str(example_files()[0]), *words])
    assert (done.exit_code, done.stderr) == (2, f"error: {message}\n")


def test_what_is_no_file_is_not_read(tiny_bundle: Path, tmp_path: Path) -> None:
    """A pipe would be waited for, and /dev/zero has no end."""
    os.mkfifo(tmp_path / "pipe.png")
    done = CliRunner().invoke(main, ["explain", str(tiny_bundle), str(tmp_path / "pipe.png")])
    assert (done.exit_code, done.stderr) == (2, f"error: {tmp_path / 'pipe.png'} is not a file\n")


def test_what_an_earlier_run_wrote_is_not_explained(tiny_bundle: Path, here: Path) -> None:
    """Also where the results lie below the folder of the images; a file by its name is taken."""
    picture(here / "one.png")
    first, again = (
        json.loads(success("explain", tiny_bundle, ".", "--json").stdout) for _ in range(2)
    )
    assert [report["file"] for report in first] == [report["file"] for report in again]
    (written,) = first[0]["files"]
    (report,) = json.loads(success("explain", tiny_bundle, written, "--json").stdout)
    assert report["file"] == written
    (here / "one.png").unlink()
    message = ". holds no images but those in --output explanations"
    assert failure("explain", tiny_bundle, ".") == message


def test_explain_takes_at_most_the_limit(tiny_bundle: Path, here: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        picture(here / name)
    words = ("explain", tiny_bundle, "c.png", "a.png", "b.png", "--save", "none", "--limit", 2)
    reports = json.loads(success(*words, "--json").stdout)
    assert [report["file"] for report in reports] == ["c.png", "a.png"]


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams_change_nothing(tiny_bundle: Path, here: Path, closed: str) -> None:
    picture(here / "one.png")
    words = [str(SCRIPT), "explain", str(tiny_bundle), "one.png"]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *words], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("one.png: class ") or (closed, done.stdout) == (">&-", "")
    assert len(list((here / "explanations").iterdir())) == 1


@pytest.mark.slow
def test_long_and_broken_names_are_mended_and_told_apart(tiny_bundle: Path, here: Path) -> None:
    names = [f"{'n' * 240}.png", f"{'n' * 239}m.png", f"{'猫' * 80}.png", "a\nb\x1b[31m.png"]
    for name in names:
        picture(here / name)
    success("explain", tiny_bundle, *names, "--target", 3, "--save", "json")
    written = sorted(path.name for path in (here / "explanations").iterdir())
    stems = ["n" * 80, f"{'n' * 80}-2", "猫" * 26, "a-b-[31m"]
    assert written == sorted(f"{stem}-dog-3.json" for stem in stems)


@pytest.mark.slow
def test_a_named_file_that_may_not_be_read_is_passed_over(
    tiny_bundle: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(here / "one.png")
    locked = picture(here / "two.png")
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == locked.name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != locked.name)
    done = run("explain", tiny_bundle, "two.png", "one.png", "--save", "none")
    assert refusal(done) == "two.png cannot be read: Permission denied"
    assert done.stdout.startswith("one.png: class ")


@pytest.mark.slow
def test_a_bundle_whose_path_is_no_text(tiny_bundle: Path, here: Path) -> None:
    folder = Path(os.fsdecode(b"b\xe9"))
    shutil.copytree(tiny_bundle, folder)
    picture(here / "one.png")
    message = failure("explain", folder, "one.png")
    assert message.endswith(r"cannot open b\udce9/backbone.onnx: its path is not UTF-8; rename it")

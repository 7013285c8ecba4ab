"""The command line: what it prints and writes, and one line for everything that goes wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from ccam_deploy import __version__, explainer, explanation, render
from ccam_deploy.bundle.folder import read_bundle, write_manifest
from ccam_deploy.bundle.manifest import Precision, PrecisionName
from ccam_deploy.cli import options
from ccam_deploy.cli.explain import FILES
from ccam_deploy.cli.main import main
from ccam_deploy.engines import Backend
from ccam_deploy.engines.tensorrt import library, plans
from ccam_deploy.explanation import Explanation
from ccam_deploy.export.program import trace_model
from tests.command import failure, refusal, run, success
from tests.damage import contents, flip, full_disk
from tests.helpers import RECIPES, example_files
from tests.networks import Detached, tiny

SCRIPT = Path(sys.executable).with_name("ccam-deploy")
DIGITS = RECIPES / "digits.toml"
WEIGHTS = ["--arch", "tests.networks:tiny", "--input-size", "32x48"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs and a file of weights. Do not change them: copy them."""
    folder = tmp_path_factory.mktemp("models")
    torch.export.save(trace_model(tiny(), (3, 32, 48)), folder / "net.pt2")
    torch.export.save(trace_model(Detached(), (3, 32, 48)), folder / "aside.pt2")
    torch.save(tiny().state_dict(), folder / "net.pt")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def picture(path: Path, size: tuple[int, int] = (40, 30), seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_the_installed_command_lists_all_commands() -> None:
    done = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    names = re.findall(r"^  (\w+)  ", done.stdout.split("Commands:")[1], re.MULTILINE)
    assert names == sorted(main.commands)


def test_help_is_quick() -> None:
    """It imports few modules: a count, for a time would be the machine's too."""
    code = (
        "import sys; before = set(sys.modules); from ccam_deploy.cli.main import main\n"
        "try: main(['--help'])\n"
        "finally: print(len(set(sys.modules) - before))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 100


@pytest.mark.parametrize("words", [["--help"], ["explain", "--help"], ["export", "--help"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from ccam_deploy.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print([m for m in ('torch', 'onnx', 'onnxruntime', 'numba', 'numpy') "
        "if m in sys.modules])\n"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_defaults_and_choices_are_the_packages() -> None:
    """They are repeated in cli.options, so that --help imports nothing heavy."""
    assert get_args(Backend) == options.BACKENDS
    assert get_args(PrecisionName) == options.PRECISIONS
    assert options.BATCH_SIZE == explainer.DEFAULT_BATCH
    assert render.Look() == render.Look(options.COLORMAP, options.OPACITY)
    assert tuple(library.FLAVOURS) == options.TENSORRT
    assert explanation.FORMATS == FILES
    assert plans.DEFAULT_MAX_BATCH == options.MAX_BATCH


@pytest.mark.slow
def test_export_of_a_program(models: Path, here: Path) -> None:
    (here / "names.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    result = success("export", models / "net.pt2", "--labels", "names.txt", "--json")
    report = json.loads(result.stdout)
    bundle = read_bundle(here / "engines" / "net")
    assert report["bundle"] == "engines/net"
    assert report["manifest"]["digest"] == bundle.manifest.digest
    assert bundle.manifest.labels == ("ant", "bee", "cat", "dog", "eel")
    assert (bundle.manifest.name, bundle.manifest.source) == ("net", "net.pt2")
    assert "converting the fp32 graphs of relu1, relu2" in result.stderr.splitlines()
    assert tree(here / "engines") == ["net", *(f"net/{name}" for name in tree(bundle.folder))]


@pytest.mark.slow
def test_export_of_weights(models: Path, here: Path, tiny_bundle: Path) -> None:
    options = [*WEIGHTS, "--layers", "relu1, relu2", "--output", "out"]
    options += ["--mean", "0.485,0.456,0.406", "--calibration-images", str(here)]
    picture(here / "calibration.png")
    result = success("export", models / "net.pt", *options)
    first, second = result.stdout.splitlines()
    assert first == "out: 5 classes, layers relu1, relu2"
    number = r"\d\.\de[-+]\d\d"
    pattern = f"fp32 against PyTorch: logits {number}, gradients {number}, saliency rank corr"
    assert re.match(pattern, second)
    assert read_bundle("out").precision("fp32").fidelity.images == 1
    for name in ("backbone.onnx", "weights.bin"):
        assert (here / "out" / name).read_bytes() == (tiny_bundle / name).read_bytes()


class ExportingError(Exception):
    """Raised where an export would begin."""


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["--calibration-images", "."], 3),
        (["--calibration-images", ".", "--limit", 2], 2),
        (["--limit", 1], 1),
    ],
)
def test_limit_caps_the_images_of_an_export(
    models: Path, here: Path, monkeypatch: pytest.MonkeyPatch, words: list[object], count: int
) -> None:
    def note(*arguments: Any) -> None:
        counts.append(len(arguments[-1].calibration))
        raise ExportingError

    counts: list[int] = []
    monkeypatch.setattr("ccam_deploy.export.export", note)
    for name in "abc":
        picture(here / f"{name}.png")
    assert isinstance(run("export", models / "net.pt2", *words).exception, ExportingError)
    assert counts == [count]


LINE = re.compile(r"(\S+): class (\w+), probability (0\.\d{3}), masks \d+\+\d+, \d+\.\d ms")


def test_explain_writes_what_was_asked_for(tiny_bundle: Path, here: Path) -> None:
    picture(here / "one.png")
    words = ["explain", tiny_bundle, "one.png", "--target", "cat"]
    result = success(*words, "--save", "overlay,heatmap, panel,npz,json")
    first, *written = result.stdout.splitlines()
    matched = LINE.fullmatch(first)
    assert matched
    assert (matched[1], matched[2]) == ("one.png", "cat")
    stem = "explanations/one-cat"
    kinds = ("overlay.png", "heatmap.png", "npz", "json")
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
    line, *written = success(*words, "--save", "overlay,panel,npz,json").stdout.splitlines()
    assert re.fullmatch(r"one\.png: class cat, probability 0\.\d{3}, \d+\.\d ms", line)
    assert len(written) == 4
    content = json.loads(Path("explanations/one-cat.json").read_text())
    assert content["settings"]["method"] == "layer-cam"
    expected = {"layers": ["relu2", "relu1"], "relu": True, "scaling": "shallow", "gamma": 3.0}
    assert content["settings"]["options"] == expected
    assert content["weights"] == content["mic"] == []
    with np.load("explanations/one-cat.npz") as arrays:
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


def test_info(tiny_bundle: Path) -> None:
    text = success("info", tiny_bundle).stdout
    assert re.search(r"^input +3 channels, 32x48, cut from 37x55, bilinear$", text, re.M)
    assert re.search(r"^classes +5, named$", text, re.M)
    assert re.search(r"^relu2 +8 +8 +12$", text, re.M)
    manifest = json.loads(success("info", tiny_bundle, "--json").stdout)
    assert manifest == json.loads((tiny_bundle / "manifest.json").read_text())


def test_info_compares_the_precisions(tiny_bundle: Path, here: Path) -> None:
    """A column for each, with what the manifest records."""
    folder = shutil.copytree(tiny_bundle, here / "tiny")
    manifest = read_bundle(folder).manifest
    whole = manifest.precisions["fp32"]
    report = replace(
        whole.fidelity,
        logits=0.015,
        masked_logits=0.25,
        features=(0.001, 0.002),
        gradients=(0.3, 0.04),
        saliency_rank=0.98765,
        worst_saliency_rank=0.5,
        saliency_similarity=0.87654,
        saliency_overlap=0.7654,
        partitions=0.75,
    )
    both: dict[PrecisionName, Precision] = {
        "fp32": whole,
        "int8": replace(whole, fidelity=report),
    }
    write_manifest(folder, replace(manifest, precisions=both))
    lines = success("info", folder).stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("against PyTorch"))
    assert lines[start].split() == ["against", "PyTorch", "in", "float32", "fp32", "int8"]
    last = {line[:29].strip(): line.split()[-1] for line in lines[start:]}
    assert last == {
        "against PyTorch in float32": "int8",
        "logits, relative error": "1.5e-02",
        "masked logits": "2.5e-01",
        "features, worst layer": "2.0e-03",
        "gradients, worst layer": "3.0e-01",
        "equal partitions": "75.0%",
        "saliency, rank correlation": "0.9877",
        "of the worst image": "0.5000",
        "saliency, SSIM": "0.8765",
        "saliency, top 10 % in common": "76.5%",
        "images": "2",
    }
    recorded = json.loads(success("info", folder, "--json").stdout)["precisions"]
    assert recorded["int8"]["fidelity"]["saliency_overlap"] == 0.7654


def test_verify(tiny_bundle: Path, here: Path) -> None:
    last = success("verify", tiny_bundle).stdout.splitlines()[-1]
    assert last == f"{tiny_bundle}: 5 files and all graphs are as exported"
    report = json.loads(success("verify", tiny_bundle, "--json").stdout)
    assert report["files"] == 5
    assert report["graphs"]["fp32"]["backend"].startswith("onnxruntime-")
    assert report["graphs"]["fp32"]["logits"] < 1e-4
    shutil.copytree(tiny_bundle, here / "tiny")
    (here / "tiny" / "extra").touch()
    assert failure("verify", "tiny") == "tiny has files that its manifest does not list: extra"
    (here / "tiny" / "extra").unlink()
    strict = read_bundle(here / "tiny").manifest
    precision = replace(strict.precisions["fp32"], tolerance={"saliency_rank": 1.5})
    write_manifest(here / "tiny", replace(strict, precisions={"fp32": precision}))
    message = "the graphs do not give what was recorded: fp32: saliency_rank 1 is below 1.5"
    assert failure("verify", "tiny") == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export"], "give a model file, or a --recipe that names its own network"),
        (["export", "none.pt"], "none.pt does not exist"),
        (["--nope"], "No such option '--nope'. See ccam-deploy --help"),
        (["export", "x" * 300], f"{'x' * 300}: File name too long"),
        (["explain", "x" * 300, "one.png"], "File name too long"),
        (["explain", "tiny", "x" * 300], f"{'x' * 300}: File name too long"),
        (["export", "--allow-pickle"], "--allow-pickle goes with a model file; there is none"),
        (["export", "--recipe", str(DIGITS), "--arch", "a:b"], "--arch goes with a model file"),
        (["export", "net.pt2", "--arch", "a:b"], "--arch goes with a file of weights; net.pt2 has"),
        (
            ["export", "net.pt2", "--resize", "stretch", "--cover", "40"],
            "--cover goes with --resize crop; stretch scales to the input's size",
        ),
        (["export", "text.pt"], "text.pt is not a PyTorch file"),
        (["export", "short.pt"], "short.pt is truncated or damaged; copy or save it again"),
        (["export", "net.pt"], "net.pt holds weights alone; name their network with --arch"),
        (["export", "net.pt", "--random-weights"], "--random-weights goes with --recipe and"),
        (
            ["export", "net.pt", "--arch", "ccam_deploy.examples.digits:DigitsNet"],
            'net.pt is not for ccam_deploy.examples.digits:DigitsNet: it lacks "stem.0.weight" and',
        ),
        (
            ["export", "net.pt2", "--layers", "relu1,layer4"],
            'layer "layer4" is not in the model; it has norm1, relu1, conv2, relu2',
        ),
        (
            ["export", "aside.pt2", "--layers", "aside"],
            'the logits do not depend on layer "aside"',
        ),
        (["export", "net.pt2", "--output", "text.pt"], "text.pt exists and is not a bundle"),
        (
            ["export", "net.pt2", "--labels", "none"],
            "none cannot be read as labels: No such file or directory",
        ),
        (
            ["export", "net.pt2", "--labels", "one.png"],
            "one.png is not a text in UTF-8; save it as one",
        ),
        (["export", "net.pt2", "--recipe", "none"], "none cannot be read: No such file"),
        (["export", "net.pt2", "--calibration-images", "none"], "none does not exist"),
        (["export", "net.pt2", "--limit", "17"], "--limit is 17; an export takes at most 16"),
        (["export", "net.pt2", "--mean", "a,b"], '"a,b" is not a list of numbers such as'),
        (["export", "net.pt2", "--std", "1,nan,1"], "they must be finite"),
        (
            ["export", "net.pt2", "--input-size", "9x9x9"],
            '"9x9x9" is not a size such as 224x224. S',
        ),
        (["export", "net.pt2", "--input-size", "9" * 9], "is not a size such as 224x224"),
        (["explain", "none", "one.png"], "none is not a bundle: there is no such folder"),
        (["explain", "tiny", "one.png", "--target", "5"], "class 5 is out of range; the bundle"),
        (["explain", "tiny", "one.png", "--target", "-1"], "class -1 is out of range; the bund"),
        (["explain", "tiny", "one.png", "--target", "top9"], "top is 9; it must be 1 to 5"),
        (["explain", "tiny", "one.png", "--target", "top" + "9" * 5000], "is not in the bundle"),
        (
            ["explain", "tiny", "one.png", "--target", "cow"],
            'class "cow" is not in the bundle; it has ant, bee, cat, dog, dog',
        ),
        (["explain", "tiny", "one.png", "--target", "dog"], 'the name "dog" stands for classes'),
        (["explain", "tiny", "none.png"], "none.png does not exist"),
        (["explain", "tiny", "empty"], "empty holds no images (.jpg, "),
        (["explain", "tiny", "short.png"], "short.png cannot be decoded: "),
        (
            ["explain", "tiny", "bomb.png"],
            "bomb.png has 3600000000 pixels, more than 100",
        ),
        (["explain", "tiny", "dot.png"], "dot.png is 1x1; both sides must be at least 8"),
        (["explain", "tiny", "text.pt"], "text.pt is not an image of a known format"),
        (
            ["explain", "tiny", "one.png", "--option", "depth=3"],
            'option "depth" is unknown; collection-cam has theta, k_min, k_max, score',
        ),
        (
            ["explain", "tiny", "one.png", "--method", "cam", "--option", "theta=0.3"],
            'option "theta" is unknown; cam has layer, relu',
        ),
        (["explain", "tiny", "one.png", "--method", "sam"], "'sam' is not one of 'collection-cam'"),
        (["explain", "tiny", "one.png", "--option", "theta"], 'option "theta" is not key=value'),
        (
            ["explain", "tiny", "one.png", "--option", "k_max=x"],
            'k_max is "x"; it must be a whole number',
        ),
        (
            ["explain", "tiny", "one.png", "--option", "score=x"],
            'score is "x"; it must be one of logit, probability',
        ),
        (
            ["explain", "tiny", "one.png", "--option", "standardise=x"],
            'standardise is "x"; it must be true or false',
        ),
        (["explain", "tiny", "one.png", "--option", "layers=x"], '"x"'),
        (
            ["explain", "tiny", "one.png", "--colormap", "rainbow"],
            'color map "rainbow" is unknown; there are jet, turbo',
        ),
        (
            ["explain", "tiny", "one.png", "--save", "overlay,gif"],
            '--save "gif" is unknown; there are overlay, heatmap, panel, npz, json and none',
        ),
        (
            ["explain", "tiny", "one.png", "--save", "none,overlay"],
            "--save none writes no files, so it goes alone",
        ),
        (
            ["explain", "tiny", "one.png", "--save", ""],
            "Invalid value for '--save': \"\" names nothing. See ccam-deploy explain --help",
        ),
        (
            ["explain", "tiny", "one.png", "--option", "rise:masks=3"],
            'option "rise:masks" is for method "rise", which is not asked for here; '
            "asked for: collection-cam",
        ),
        (
            ["explain", "tiny", "one.png", "--debug"],
            "--debug goes before the command: ccam-deploy --debug explain ...",
        ),
        (["explain", "tiny", "one.png", "--colour-bar"], "'--colormap'?) See ccam-deploy ex"),
        (
            ["explain", "tiny", "one.png", "--output", "text.pt"],
            "cannot write to text.pt: it is a file, not a folder",
        ),
        (
            ["explain", "tiny", "one.png", "--output", "text.pt/sub"],
            "cannot write to text.pt/sub: Not a directory",
        ),
        (
            ["export", "net.pt2", "--output", "text.pt/sub"],
            "cannot write to text.pt: it is a file, not a folder",
        ),
        (
            ["explain", "tiny", "pictures", "--output", "pictures"],
            "--output pictures is the folder of the images too; give another one, or the next run",
        ),
        (["explain", "tiny", "one.png", "--precision", "fp16"], "the bundle has no fp16 graphs"),
        (
            ["explain", "tiny", "one.png", "--precision", "int8"],
            "the bundle has no int8 graphs, only fp32; export with --precision int8",
        ),
        (["explain", "tiny", "one.png", "--precision", "int4"], "'fp32', 'fp16', 'int8', 'fp8'"),
        (["explain", "tiny", "one.png", "--colour"], "See ccam-deploy explain --help"),
        (["explain", "tiny"], "Missing argument 'IMAGES...'. See ccam-deploy explain --help"),
        (["explane"], "No such command 'explane'"),
        (["verify", "tiny", "--backend", "tpu"], "'tpu' is not one of 'auto', 'tensorrt'"),
        (["verify", "none"], "none is not a bundle: there is no such folder"),
        (["info", "text.pt"], "text.pt is not a bundle: it is a file, not a folder"),
        (["explain", "changed", "one.png"], "changed/weights.bin was changed after the export"),
        (["verify", "changed"], "changed/weights.bin was changed after the export"),
        (["info", "changed"], "changed/weights.bin was changed after the export"),
        (["info", "outside"], 'the manifest of outside leads outside its folder: "../weights.bin"'),
    ],
)
def test_bad_input(
    models: Path, tiny_bundle: Path, here: Path, words: list[str], message: str
) -> None:
    (here / "empty").mkdir()
    (here / "pictures").mkdir()
    picture(here / "pictures" / "one.png")
    (here / "text.pt").write_text("not a model\n")
    for name in ("net.pt", "net.pt2", "aside.pt2"):
        shutil.copy(models / name, here)
    (here / "short.pt").write_bytes((models / "net.pt").read_bytes()[:3000])
    picture(here / "one.png")
    picture(here / "dot.png", (1, 1))
    (here / "short.png").write_bytes((here / "one.png").read_bytes()[:900])
    (here / "bomb.png").write_bytes(bomb())
    for name in ("tiny", "changed", "outside"):
        shutil.copytree(tiny_bundle, here / name)
    flip(here / "changed" / "weights.bin", 100)
    manifest = read_bundle(here / "outside").manifest
    files = manifest.files | {"../weights.bin": manifest.files["weights.bin"]}
    write_manifest(here / "outside", replace(manifest, files=files))
    before = tree(here)
    assert message in failure(*words)
    assert tree(here) == before


def bomb() -> bytes:
    """A PNG of 100 bytes that claims to have 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def test_the_command_alone_shows_its_help() -> None:
    result = run()
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ccam-deploy [OPTIONS] COMMAND [ARGS]...")


def test_the_module_is_the_command(here: Path) -> None:
    """It calls itself by the command's name, and answers with its exit codes."""
    for words, code, expected in (
        (["--version"], 0, f"ccam-deploy, version {__version__}\n"),
        (["--nope"], 2, "error: No such option '--nope'. See ccam-deploy --help\n"),
    ):
        command = [sys.executable, "-m", "ccam_deploy", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout + done.stderr) == (code, expected)


def test_version_and_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    assert success("--version").stdout == f"ccam-deploy, version {__version__}\n"
    monkeypatch.setenv("_CCAM_DEPLOY_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "ccam-deploy ver")
    monkeypatch.setenv("COMP_CWORD", "1")
    result = CliRunner().invoke(main, [], prog_name="ccam-deploy")
    assert (result.exit_code, result.stdout) == (0, "plain,verify\n")


@pytest.mark.parametrize("words", [["--nope"], ["export", "x" * 300]])
def test_debug_keeps_every_error(words: list[str]) -> None:
    assert isinstance(run("--debug", *words).exception, click.UsageError | OSError)


@pytest.mark.slow
def test_pickles_are_warned_of_only_where_there_are_any(models: Path, here: Path) -> None:
    torch.save(tiny(), here / "pickled.pt")
    for file, warnings in (("pickled.pt", 1), (models / "net.pt2", 0)):
        result = success("export", file, "--allow-pickle", "--input-size", "32x48", "--output", "o")
        assert result.stderr.count("runs the code that it holds") == warnings


def test_debug_shows_the_error_itself(here: Path) -> None:
    result = run("--debug", "info", "none")
    assert result.exit_code == 1
    assert "there is no such folder" in str(result.exception)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1000, 10000])
def test_full_disk_while_exporting(models: Path, tiny_bundle: Path, here: Path, limit: int) -> None:
    """In the weights, and in the recorded values."""
    shutil.copytree(tiny_bundle, here / "tiny")
    before = contents(here)
    with full_disk(limit):
        result = run("export", models / "net.pt2", "--output", "tiny")
    assert refusal(result) == "cannot write tiny: File too large"
    assert contents(here) == before
    assert [path.name for path in here.iterdir()] == ["tiny"]


def test_full_disk_while_explaining(tiny_bundle: Path, here: Path) -> None:
    picture(here / "one.png")
    with full_disk(500):
        result = run("explain", tiny_bundle, "one.png")
    assert re.fullmatch(
        r"cannot write explanations/one-[\w-]+\.overlay\.png: File too large", refusal(result)
    )
    assert tree(here) == ["explanations", "one.png"]


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

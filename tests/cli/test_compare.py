"""`ccam-deploy compare`: a picture of overlays, a row for each class, a column for each method."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import ccam_deploy as ccam
from ccam_deploy import render
from ccam_deploy.cli import choices
from ccam_deploy.cli.compare import COMPARED
from ccam_deploy.image_files import load_image
from ccam_deploy.methods import METHODS, GradCAM, ScoreCAM
from ccam_deploy.preprocess import to_grey_or_rgb
from ccam_deploy.targets import Top
from tests.command import failure, success
from tests.helpers import example_files
from tests.pictures import place_of

SCENE = example_files()[6]


def test_rows_are_classes_and_columns_methods(digits: ccam.Explainer, tmp_path: Path) -> None:
    """The tiles are drawn here from the explainer's own maps."""
    output = tmp_path / "sub" / "panel.png"
    methods = ("collection-cam", "layer-cam")
    given = ["--methods", ",".join(methods), "--option", "k_max=4", "--output", output]
    given += ["--target", "top2", "--target", "8"]
    printed = success("compare", digits.bundle.folder, SCENE, *given).stdout.splitlines()
    options = (r"theta=0\.1 .*k_max=4 .*", r'layers=\[\] relu=true scaling="shallow" gamma=2\.0')
    for line, method, words in zip(printed, methods, options, strict=False):
        assert re.fullmatch(rf"{method}: \d+\.\d ms, {words}", line)
    assert printed[2:] == [f"  {output}"]
    picture = to_grey_or_rgb(load_image(SCENE), 3)
    chosen = (ccam.CollectionCAM(k_max=4), "layer-cam")
    results = [digits.explain([picture], Top(2), method=method) for method in chosen]
    assert sorted(results[0].targets.tolist()) == [5, 8]
    panel = load_image(output)
    places = [
        place_of(render.overlay(picture, result.on_original(row)).resize((192, 192)), panel)
        for result in results
        for row in range(2)
    ]
    (left, top), (_, below_top) = places[:2]
    right = places[2][0]
    assert left < right
    assert places == [(left, top), (left, below_top), (right, top), (right, below_top)]
    assert 2 * (below_top - top) == panel.height
    shown = panel.crop((4, below_top, 196, below_top + 192))
    np.testing.assert_array_equal(shown, picture.resize((192, 192)))


def test_a_color_bar_ends_each_row(digits_bundle: Path, tmp_path: Path) -> None:
    widths = []
    for bar in ((), ("--color-bar",)):
        success("compare", digits_bundle, SCENE, *bar, "--output", tmp_path / "panel.png")
        widths.append(load_image(tmp_path / "panel.png").width)
    assert widths[1] > widths[0] + 10


def test_the_default_methods_are_there() -> None:
    assert set(COMPARED) < set(METHODS)


def test_options_go_to_the_methods_that_have_them() -> None:
    found = choices.make_methods(
        ["collection-cam", "score-cam", "grad-cam"],
        ["layer=layer3", "grad-cam:relu=false", "k_max=3"],
    )
    assert found["collection-cam"] == ccam.CollectionCAM(k_max=3)
    assert found["score-cam"] == ScoreCAM(layer="layer3")
    assert found["grad-cam"] == GradCAM(layer="layer3", relu=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "magic"], 'method "magic" is unknown; there are collection-cam'),
        (
            ["--option", "rise:theta=0"],
            'option "rise:theta" is for method "rise", which is not asked for here',
        ),
        (["--option", "depth=3"], 'option "depth" is unknown; collection-cam has theta, k_min'),
        (["--option", "k_max=x"], 'k_max is "x"; it must be a whole number'),
        (["--target", "top11"], "top is 11; it must be 1 to 10"),
        (["--target", "zebra"], 'class "zebra" is not in the bundle'),
        (
            ["--methods", "cam,recipro-cam,smoothgrad"],
            "some methods cannot run here: recipro-cam (the bundle has no head graph; export it "
            "with --head), smoothgrad (the bundle has no input_gradient graph",
        ),
        (["--output", "panel.jpg"], "--output panel.jpg must end in .png"),
        (["--colormap", "rainbow"], 'color map "rainbow" is unknown'),
    ],
)
def test_bad_input(
    digits_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in failure("compare", digits_bundle, SCENE, *words)
    assert not list(tmp_path.iterdir())


def test_an_image_that_is_none(digits_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image\n")
    message = failure("compare", digits_bundle, tmp_path / "text.png")
    assert "text.png is not an image of a known format" in message


def test_json(digits_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "panel.png"
    words = ("--methods", "grad-cam, layer-cam", "--option", "relu=false", "--target", "8")
    printed = success("compare", digits_bundle, SCENE, *words, "--output", output, "--json").stdout
    content = json.loads(printed)
    assert (content["classes"], content["picture"]) == (["8"], str(output))
    assert [entry["method"] for entry in content["methods"]] == ["grad-cam", "layer-cam"]
    assert all(entry["options"]["relu"] is False for entry in content["methods"])
    assert all(entry["milliseconds"] > 0 for entry in content["methods"])
    assert output.is_file()

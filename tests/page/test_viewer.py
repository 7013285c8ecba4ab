"""What the page's buttons do is what the explainer does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ccam_deploy as ccam
from ccam_deploy.errors import ImageError, OptionError, TargetError
from ccam_deploy.image_files import load_image
from ccam_deploy.page.viewer import Viewer, options_told
from tests.cli.test_bad_input import bomb
from tests.helpers import SCENES

SCENE = SCENES / "scene-7-digits-8-5.png"


@pytest.fixture
def viewer(digits: ccam.Explainer) -> Viewer:
    return Viewer(digits)


def test_the_ranking_has_the_probabilities_of_explanations(viewer: Viewer) -> None:
    picture = viewer.picture(SCENE.read_bytes())
    ranking = viewer.ranking(picture)
    explanation = viewer.explainer.explain([picture], ccam.Top(5), method="grad-cam")
    assert [ranked.number for ranked in ranking] == explanation.targets.tolist()
    assert [ranked.label for ranked in ranking] == list(explanation.labels)
    expected = [explanation.probability(pair) for pair in range(5)]
    assert [ranked.score for ranked in ranking] == pytest.approx(expected, abs=1e-12)
    assert viewer.has_probabilities


def test_an_explanation_is_the_explainer_s(viewer: Viewer) -> None:
    picture = viewer.picture(SCENE.read_bytes())
    values = {field.name: field.default for field in viewer.fields("collection-cam")}
    view = viewer.explain(picture, 5, "collection-cam", {**values, "k_max": 4})
    with ccam.load(viewer.explainer.bundle) as fresh:
        method = ccam.CollectionCAM(k_max=4)
        expected = fresh.explain([load_image(SCENE)], [[5]], method=method)
    assert np.array_equal(view.explanation.saliency, expected.saliency)
    assert view.explanation.overlay().tobytes() == expected.overlay().tobytes()
    assert view.explanation.labels == ("5",)
    assert options_told(view, viewer.fields("collection-cam")) == ["k_max 4"]


def test_the_time_is_that_of_the_explanation(digits: ccam.Explainer) -> None:
    viewer = Viewer(digits, iter([1.0, 3.5]).__next__)
    picture = viewer.picture(SCENE.read_bytes())
    values = {field.name: field.default for field in viewer.fields("grad-cam")}
    assert viewer.explain(picture, 1, "grad-cam", values).seconds == 2.5


def test_methods_that_cannot_run_say_why(viewer: Viewer) -> None:
    assert viewer.methods[:3] == ("collection-cam", "grad-cam", "grad-cam++")
    assert viewer.missing["recipro-cam"] == "the bundle has no head graph; export it with --head"
    assert not set(viewer.methods) & set(viewer.missing)
    picture = viewer.picture(SCENE.read_bytes())
    with pytest.raises(OptionError, match="recipro-cam cannot run here: the bundle has no head"):
        viewer.explain(picture, 1, "recipro-cam", {})
    with pytest.raises(OptionError, match='method "x" is unknown'):
        viewer.explain(picture, 1, "x", {})


@pytest.mark.parametrize(
    ("chosen", "typed", "number"), [("3", "", 3), ("3", " 7 ", 7), ("", "0", 0), ("3", " ", 3)]
)
def test_a_typed_class_goes_before_a_chosen_one(
    viewer: Viewer, chosen: str, typed: str, number: int
) -> None:
    assert viewer.class_number(chosen, typed) == number


@pytest.mark.parametrize(
    ("typed", "line"),
    [("", "no class is chosen"), ("11", "class 11 is out of range"), ("x" * 10**6, "letters")],
)
def test_classes_that_there_are_not(viewer: Viewer, typed: str, line: str) -> None:
    with pytest.raises(TargetError, match=line) as raised:
        viewer.class_number("", typed)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"no picture", "the picture is not an image of a known format"),
        (b"", "the picture is not an image of a known format"),
        (bomb(), "the picture has 3600000000 pixels, more than 100000000; scale it down first"),
        (SCENE.read_bytes()[:2000], "the picture cannot be decoded"),
    ],
)
def test_what_is_no_picture_is_one_line(viewer: Viewer, content: bytes, line: str) -> None:
    with pytest.raises(ImageError, match=line) as raised:
        viewer.picture(content)
    assert str(Path.cwd()) not in str(raised.value)

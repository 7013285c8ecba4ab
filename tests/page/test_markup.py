"""The page's HTML: the explainer's pictures, and text that stays text."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import ccam_deploy as ccam
from ccam_deploy.methods import METHODS
from ccam_deploy.page import markup
from ccam_deploy.page.fields import fields_of
from ccam_deploy.page.viewer import RankedClass, View
from ccam_deploy.render import Look
from tests.helpers import example_pictures

EVIL = '<script>alert("1")</script>&\n'


class Parsed(HTMLParser):
    """The tags of a piece of HTML, with their attributes, and all of its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def pictures(html: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/\w+;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(content))) for content in found]


def view(explainer: ccam.Explainer, method: str = "collection-cam") -> View:
    explanation = explainer.explain(example_pictures()[0], [[3]], method=method)
    return View(explanation, 0.0421)


def test_a_result_shows_the_overlay(digits: ccam.Explainer) -> None:
    look = Look("viridis", 0.3)
    shown = view(digits)
    html = markup.result(shown, look, True, fields_of("collection-cam", ()))
    overlay, *masks = pictures(html)
    assert overlay.format == "PNG"
    expected = np.asarray(shown.explanation.overlay(0, look))
    assert np.array_equal(np.asarray(overlay), expected)
    count = len(shown.explanation.weights[0])
    assert len(masks) == count + len(shown.explanation.layers)
    parsed = Parsed(html)
    assert f"{shown.explanation.probability():.1%}" in parsed.text
    assert "collection-cam · 42 ms" in parsed.text
    assert f"{count} masks" in parsed.text
    assert not [a for tag, a in parsed.tags if tag == "img" and "data:" not in str(a["src"])]


def test_weights_of_layers_add_up(digits: ccam.Explainer) -> None:
    html = markup.result(view(digits), Look(), True, ())
    weights = [float(number) for number in re.findall(r"weight (\d\.\d+)</h4>", html)]
    assert len(weights) == 4
    assert sum(weights) == pytest.approx(1, abs=0.003)
    names = re.findall(r"<h4>(\S+) ", html)
    assert names == ["layer4", "layer3", "layer2", "layer1"]


def test_a_method_without_masks_has_one_picture(digits: ccam.Explainer) -> None:
    html = markup.result(view(digits, "grad-cam"), Look(), True, fields_of("grad-cam", ()))
    assert len(pictures(html)) == 1
    assert "masks" not in Parsed(html).text


def test_names_stay_text(digits: ccam.Explainer) -> None:
    shown = view(digits)
    source = shown.explanation.source
    manifest = replace(source.manifest, labels=(EVIL,) * source.manifest.classes)
    explanation = replace(shown.explanation, source=replace(source, manifest=manifest))
    html = markup.result(View(explanation, 0.1), Look(), True, ())
    html += markup.error(EVIL) + markup.empty(EVIL) + markup.head(EVIL, EVIL, [EVIL], {EVIL: EVIL})
    parsed = Parsed(html)
    assert "script" not in [tag for tag, _ in parsed.tags]
    assert parsed.text.count("<script>alert") == 8


def test_an_error_is_one_short_line() -> None:
    parsed = Parsed(markup.error("x" * 5000 + "\n<b>"))
    assert len(parsed.text) == 400
    assert [tag for tag, _ in parsed.tags] == ["p"]
    assert Parsed(markup.error("a\nb")).text == "a\\nb"


def test_methods_that_cannot_run_are_listed_with_their_reasons() -> None:
    text = Parsed(markup.head("net", "onnxruntime-cpu", [], {"rise": "no masks"})).text
    assert f"1 of {len(METHODS)} methods cannot run with this bundle" in text
    assert "rise: no masks" in text
    assert "cannot run" not in markup.head("net", "onnxruntime-cpu", [], {})


def test_scores() -> None:
    ranked = RankedClass(7, "seven\n", 0.61349)
    assert markup.choice(ranked, True) == "seven\\n · 61.3%"
    assert markup.choice(ranked, False) == "seven\\n · output 0.613"

"""Methods by name: what the command line offers, whose options are whose, what a result tells."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import ccam_deploy as ccam
from ccam_deploy.cli import options
from ccam_deploy.engines.base import Array
from ccam_deploy.engines.onnxruntime import OnnxRuntimeEngine
from ccam_deploy.errors import OptionError
from ccam_deploy.methods import (
    CAM,
    DEFAULT_METHOD,
    METHODS,
    RISE,
    CollectionCAM,
    GradCAM,
    Method,
    ScoreCAM,
    make_method,
)
from tests.helpers import noise

NEEDY = {
    "recipro-cam",
    "integrated-gradients",
    "smoothgrad",
    "excitation-backprop",
    "guided-backprop",
    "xrai",
}
"""Methods that need graphs which an export writes only where it is told to."""


def test_the_command_line_offers_them_all() -> None:
    """They are repeated in cli.options, so that --help imports nothing heavy."""
    assert tuple(METHODS) == options.METHODS
    assert METHODS[DEFAULT_METHOD].name == options.METHODS[0] == "collection-cam"


@pytest.mark.parametrize("name", METHODS)
def test_options_are_frozen_and_have_defaults(name: str) -> None:
    kind: Any = METHODS[name]
    assert kind() == make_method(name)
    assert kind.__dataclass_params__.frozen
    documented = kind.__doc__ or ""
    for field in dataclasses.fields(kind):
        assert field.name in documented


def test_no_two_methods_are_equal() -> None:
    assert len({method() for method in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_result_tells_method_and_options(headed_bundle: Path, name: str) -> None:
    chosen = RISE(masks=20) if name == "rise" else METHODS[name]()
    with ccam.load(headed_bundle) as explainer:
        result = explainer.explain(noise(2, 3, 32, 48), [1, 3], method=chosen)
    assert result.settings["method"] == name
    assert result.settings["options"] == dataclasses.asdict(chosen)
    assert len(result) == len(result.masks) == len(result.weights) == len(result.mic) == 2


@pytest.mark.parametrize("name", METHODS)
def test_a_check_refuses_what_an_explanation_does(
    headed_bundle: Path, tiny_bundle: Path, name: str
) -> None:
    """With the same words, and on a bundle with all graphs it refuses nothing."""
    chosen = RISE(masks=20) if name == "rise" else METHODS[name]()
    with ccam.load(headed_bundle) as explainer:
        explainer.require_method(chosen)
    with ccam.load(tiny_bundle) as explainer:
        said = []
        for call in (
            lambda: explainer.require_method(chosen),
            lambda: explainer.explain(noise(1, 3, 32, 48), 0, method=chosen),
        ):
            try:
                call()
                said.append("")
            except OptionError as error:
                said.append(str(error))
    assert said[0] == said[1]
    assert ("export it with --" in said[0]) == (name in NEEDY)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (CollectionCAM(layers=("x",)), 'layer "x" is not in the bundle'),
        (GradCAM(layer="x"), 'layer "x" is not in the bundle'),
        (ScoreCAM(layer="x"), 'layer "x" is not in the bundle'),
        (CAM(layer="relu1"), "cam needs logits that are linear in the mean of"),
        (RISE(file="none.npy"), r"none\.npy is not a \.npy file that can be read"),
        (RISE(cells=40), "cells is 40; an input of 32x48 takes 32"),
    ],
)
def test_a_check_finds_options_that_do_not_suit(
    tiny_bundle: Path, method: Method, message: str
) -> None:
    with ccam.load(tiny_bundle) as explainer, pytest.raises(OptionError, match=message):
        explainer.require_method(method)


@pytest.mark.parametrize("name", METHODS)
def test_a_check_is_a_few_passes(
    headed_bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rows = []
    plain = OnnxRuntimeEngine.run

    def counting(engine: OnnxRuntimeEngine, feeds: Mapping[str, Array]) -> dict[str, Array]:
        rows.append(max(len(value) for value in feeds.values()))
        return plain(engine, feeds)

    monkeypatch.setattr(OnnxRuntimeEngine, "run", counting)
    with ccam.load(headed_bundle, backend="onnxruntime-cpu") as explainer:
        explainer.require_method(name)
    assert 1 <= len(rows) <= 4
    assert set(rows) == {1}


def test_the_default_is_collection_cam(tiny_bundle: Path) -> None:
    with ccam.load(tiny_bundle) as explainer:
        plain = explainer.explain(noise(1, 3, 32, 48))
        named = explainer.explain(noise(1, 3, 32, 48), method="collection-cam")
    assert plain.settings == named.settings
    assert (plain.raw_saliency == named.raw_saliency).all()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("no-cam", 'method "no-cam" is unknown; there are collection-cam, grad-cam, '),
        (GradCAM, "the method is <class '.*GradCAM'>; give a name, or a method like GradCAM()"),
        ({"relu": False}, "the method is {'relu': False}; give a name"),
    ],
)
def test_what_does_not_fit_is_refused(method: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_method(method)


def test_option_types_can_be_read() -> None:
    """The command line converts words to these types."""
    for method in METHODS.values():
        assert typing.get_type_hints(method)

"""Methods by name: what the command line offers, whose options are whose, what a result tells."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path

import pytest

import ccam_deploy as ccam
from ccam_deploy.cli import options
from ccam_deploy.engines.base import Array
from ccam_deploy.engines.onnxruntime import OnnxRuntimeEngine
from ccam_deploy.errors import OptionError
from ccam_deploy.methods import (
    DEFAULT_METHOD,
    METHODS,
    CAMOptions,
    CollectionCAMOptions,
    GradCAMOptions,
    LayerCAMOptions,
    RISEOptions,
    ScoreCAMOptions,
    with_options,
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
    kind = METHODS[name].options_type
    assert METHODS[name]().options == kind()
    assert kind.__dataclass_params__.frozen
    documented = kind.__doc__ or ""
    for field in dataclasses.fields(kind):
        assert field.name in documented


def test_no_two_methods_share_their_options() -> None:
    kinds = [method.options_type for method in METHODS.values()]
    assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize("name", METHODS)
def test_result_tells_method_and_options(headed_bundle: Path, name: str) -> None:
    chosen = RISEOptions(masks=20) if name == "rise" else METHODS[name].options_type()
    with ccam.load(headed_bundle) as explainer:
        result = explainer.explain(noise(2, 3, 32, 48), [1, 3], chosen, method=name)
    assert result.settings["method"] == name
    assert result.settings["options"] == dataclasses.asdict(chosen)
    assert len(result) == len(result.masks) == len(result.weights) == len(result.mic) == 2


@pytest.mark.parametrize("name", METHODS)
def test_a_check_refuses_what_an_explanation_does(
    headed_bundle: Path, tiny_bundle: Path, name: str
) -> None:
    """With the same words, and on a bundle with all graphs it refuses nothing."""
    chosen = RISEOptions(masks=20) if name == "rise" else METHODS[name].options_type()
    with ccam.load(headed_bundle) as explainer:
        explainer.check(name, chosen)
    with ccam.load(tiny_bundle) as explainer:
        said = []
        for call in (
            lambda: explainer.check(name, chosen),
            lambda: explainer.explain(noise(1, 3, 32, 48), 0, chosen, method=name),
        ):
            try:
                call()
                said.append("")
            except OptionError as error:
                said.append(str(error))
    assert said[0] == said[1]
    assert ("export it with --" in said[0]) == (name in NEEDY)


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("collection-cam", CollectionCAMOptions(layers=("x",)), 'layer "x" is not in the bundle'),
        ("grad-cam", GradCAMOptions(layer="x"), 'layer "x" is not in the bundle'),
        ("score-cam", ScoreCAMOptions(layer="x"), 'layer "x" is not in the bundle'),
        ("cam", CAMOptions(layer="relu1"), "cam needs logits that are linear in the mean of"),
        ("rise", RISEOptions(file="none.npy"), r"none\.npy is not a \.npy file that can be read"),
        ("rise", RISEOptions(cells=40), "cells is 40; an input of 32x48 takes 32"),
    ],
)
def test_a_check_finds_options_that_do_not_suit(
    tiny_bundle: Path, name: str, chosen: object, message: str
) -> None:
    with ccam.load(tiny_bundle) as explainer, pytest.raises(OptionError, match=message):
        explainer.check(name, chosen)


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
    with ccam.load(headed_bundle, "onnxruntime-cpu") as explainer:
        explainer.check(name)
    assert 1 <= len(rows) <= 4
    assert set(rows) == {1}


def test_the_default_is_collection_cam(tiny_bundle: Path) -> None:
    with ccam.load(tiny_bundle) as explainer:
        plain = explainer.explain(noise(1, 3, 32, 48))
        named = explainer.explain(noise(1, 3, 32, 48), method="collection-cam")
    assert plain.settings == named.settings
    assert (plain.raw_saliency == named.raw_saliency).all()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("no-cam", None, 'method "no-cam" is unknown; there are collection-cam, grad-cam, '),
        ("grad-cam", CollectionCAMOptions(), "the options are CollectionCAMOptions; grad-cam take"),
        ("collection-cam", GradCAMOptions(), "GradCAMOptions; collection-cam takes CollectionCAM"),
        ("cam", LayerCAMOptions(), "the options are LayerCAMOptions; cam takes CAMOptions"),
        ("grad-cam", {"relu": False}, "the options are dict; grad-cam takes GradCAMOptions"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, given: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        with_options(name, given)


def test_option_types_can_be_read() -> None:
    """The command line converts words to these types."""
    for method in METHODS.values():
        assert typing.get_type_hints(method.options_type)

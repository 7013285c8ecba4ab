"""Methods by name: what the command line offers, whose options are whose, what a result tells."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest

import ccam_deploy as ccam
from ccam_deploy.cli import options
from ccam_deploy.errors import OptionError
from ccam_deploy.methods import (
    DEFAULT_METHOD,
    METHODS,
    CollectionCAMOptions,
    GradCAMOptions,
    LayerCAMOptions,
    RISEOptions,
    with_options,
)
from tests.helpers import noise


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

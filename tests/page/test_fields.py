"""The form of a method's options: complete, plain, and as strict as the method."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ccam_deploy.errors import OptionError
from ccam_deploy.methods import METHODS, CollectionCAM, LayerCAM, make_method
from ccam_deploy.page.fields import MEANINGS, MOST, WITHOUT, fields_of, method_of

LAYERS = ("stem", "layer1", "layer2")


def untouched(method: str) -> dict[str, Any]:
    """What a form sends that nobody changed."""
    return {field.name: field.default for field in fields_of(method, LAYERS)}


@pytest.mark.parametrize("name", METHODS)
def test_a_form_that_nobody_changed_is_the_method_s_default(name: str) -> None:
    assert method_of(name, untouched(name), LAYERS) == make_method(name)


@pytest.mark.parametrize("name", METHODS)
def test_every_option_has_a_field(name: str) -> None:
    names = [field.name for field in fields_of(name, LAYERS)]
    options = [option.name for option in dataclasses.fields(METHODS[name])]
    assert names == [option for option in options if option not in WITHOUT]


def test_every_meaning_is_of_an_option() -> None:
    options = {option.name for method in METHODS.values() for option in dataclasses.fields(method)}
    assert set(MEANINGS) == options - set(WITHOUT)
    assert set(MOST) <= options


def test_values_reach_the_method() -> None:
    values = {**untouched("collection-cam"), "theta": 0.25, "k_max": 4.0, "standardise": True}
    method = method_of("collection-cam", {**values, "layers": ["layer1", "layer2"]}, LAYERS)
    assert method == CollectionCAM(
        theta=0.25, k_max=4, standardise=True, layers=("layer1", "layer2")
    )
    layer_cam = {**untouched("layer-cam"), "layers": ["stem"], "relu": False, "scaling": "all"}
    assert method_of("layer-cam", layer_cam, LAYERS) == LayerCAM(("stem",), False, "all")


@pytest.mark.parametrize(
    ("method", "changes", "line"),
    [
        ("collection-cam", {"theta": None}, "theta is empty; give a number"),
        ("collection-cam", {"theta": 1.5}, r"theta is 1.5; it must be in \[0, 1\)"),
        ("collection-cam", {"k_max": 2.5}, 'k_max is "2.5"; it must be a whole number'),
        ("collection-cam", {"k_max": 101}, "k_max is 101; this page takes at most 100"),
        ("collection-cam", {"score": "x"}, 'score is "x"; it must be one of logit, probability'),
        ("collection-cam", {"score": {"a": 1}}, "score is"),
        ("rise", {"masks": 10_001}, "masks is 10001; this page takes at most 10000"),
        ("rise", {"seed": float("nan")}, 'seed is "nan"; it must be a whole number'),
        ("smoothgrad", {"samples": 10**9}, "samples is"),
        ("sesame", {}, 'method "sesame" is unknown'),
    ],
)
def test_what_no_method_takes_is_one_line(method: str, changes: dict[str, Any], line: str) -> None:
    known = untouched(method) if method in METHODS else {}
    with pytest.raises(OptionError, match=line) as raised:
        method_of(method, {**known, **changes}, LAYERS)
    assert "\n" not in str(raised.value)


def test_no_option_reads_a_file_of_the_server() -> None:
    values = {**untouched("rise"), "file": "/etc/passwd"}
    assert method_of("rise", values, LAYERS) == make_method("rise")

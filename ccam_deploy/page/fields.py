"""The options of methods as fields of a form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ccam_deploy.errors import OptionError
from ccam_deploy.methods import Method, method_named
from ccam_deploy.methods.from_words import method_from_words

Kind = Literal["switch", "choice", "several", "whole", "number"]
WITHOUT = ("file",)
"""Options that a page does not offer: they would read the server's files."""
MOST = {"masks": 10_000, "samples": 1_000, "steps": 1_000, "k_max": 100, "cells": 64}
"""The highest values that a page takes: whoever asks for more keeps all others waiting."""
MEANINGS = {
    "baseline": "Where the path to the picture starts",
    "cells": "Cells of a random mask along each side",
    "channels": "How the colours of a pixel become one value; for score-cam, how many feature maps",
    "contrastive": "Subtract what speaks for all other classes",
    "dilation": "Pixels by which a region is widened",
    "epsilon": "Added to a divisor, against division by zero",
    "gamma": "How strongly small values are lifted where layers are joined",
    "gate": "Share of a channel's largest gradient from which a pixel counts in full",
    "k_max": "The most masks of a layer",
    "k_min": "The fewest masks of a layer",
    "layer": "The layer that is looked at",
    "layers": "The layers that are looked at; all where none is chosen",
    "least": "Regions that add fewer pixels are skipped",
    "masks": "How many random masks are tried",
    "noise": "Strength of the noise, as a share of the range of values",
    "p": "Probability that a cell of a random mask is kept",
    "relu": "Cut off what speaks against the class",
    "rule": "Where the steps are taken",
    "samples": "How many noisy copies are averaged",
    "scaling": "Which layers' small values are lifted where layers are joined",
    "score": "What a mask is judged by",
    "seed": "Seed of the random numbers",
    "square": "Average squared gradients",
    "standardise": "Scale the channels' statistics before they are clustered",
    "steps": "How many steps lead to the picture",
    "theta": "Share of the smallest values of a mask that become 0",
    "weights": "What a feature map's weight is",
}


@dataclass(frozen=True)
class Field:
    """An option of a method in a form.

    Attributes:
        name: The option.
        kind: A switch, one of some choices, several of them, a whole number or any number.
        default: Its value where nobody changes it, of the kind's type.
        choices: The words to choose from, each with what is shown for it.
        meaning: What it does, in plain words.
    """

    name: str
    kind: Kind
    default: Any
    choices: tuple[tuple[str, str], ...]
    meaning: str


def fields_of(method: str, layers: Sequence[str]) -> tuple[Field, ...]:
    """List the fields of a method's options.

    Args:
        method: The method's name.
        layers: The bundle's target layers.

    Raises:
        OptionError: No method has the name.
    """
    options = method_named(method)
    hints = get_type_hints(options)
    return tuple(
        _field(option, hints[option.name], layers)
        for option in dataclasses.fields(options)
        if option.name not in WITHOUT
    )


def method_of(name: str, values: Mapping[str, Any], layers: Sequence[str]) -> Method:
    """Make a method of what a form holds.

    Args:
        name: The method's name.
        values: The values of all fields of the method; other entries are ignored.
        layers: The bundle's target layers.

    Raises:
        OptionError: The method is unknown, or a value is missing or not one that it takes.
    """
    words = {}
    for field in fields_of(name, layers):
        word = _word(field, values.get(field.name))
        if field.kind != "several" or word:
            words[field.name] = word
    method = method_from_words(method_named(name), words)
    for option, most in MOST.items():
        value = getattr(method, option, 0)
        if value > most:
            raise OptionError(f"{option} is {value}; this page takes at most {most}")
    return method


def _field(option: dataclasses.Field[Any], hint: Any, layers: Sequence[str]) -> Field:
    kind: Kind = "number"
    default = option.default
    choices: tuple[tuple[str, str], ...] = ()
    if hint is bool:
        kind = "switch"
    elif get_origin(hint) is Literal:
        kind, choices = "choice", tuple((word, word) for word in get_args(hint))
    elif option.name == "layer":
        kind = "choice"
        choices = (("", "the method's own choice"), *((layer, layer) for layer in layers))
    elif option.name == "layers":
        kind, default = "several", []
        choices = tuple((layer, layer) for layer in layers)
    elif hint is int:
        kind = "whole"
    return Field(option.name, kind, default, choices, MEANINGS[option.name])


def _word(field: Field, value: Any) -> str:
    """A field's value as text; raise OptionError where there is none."""
    if field.kind == "several":
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else ""
    if value is None or (value == "" and field.kind in ("whole", "number")):
        raise OptionError(f"{field.name} is empty; give a number")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)

"""The tree of errors, which is public, and other libraries' errors as part of a message."""

from __future__ import annotations

import inspect
import re

import pytest

import ccam_deploy as ccam
from ccam_deploy import errors
from ccam_deploy.errors import CcamError, brief

CLASSES = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}


def drawn_parents() -> dict[str, str]:
    """The class above each one in the tree of the module's docstring."""
    assert errors.__doc__
    parents: dict[str, str] = {}
    branch: list[str] = []
    for indent, name in re.findall(r"^([│├└─ ]*)(\w+Error) ", errors.__doc__, re.MULTILINE):
        depth = len(indent) // 4
        branch[depth:] = [name]
        parents[name] = branch[depth - 1] if depth else "Exception"
    return parents


def test_the_tree_is_drawn_as_it_is() -> None:
    assert drawn_parents() == {name: value.__bases__[0].__name__ for name, value in CLASSES.items()}


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_is_public_and_documented(name: str) -> None:
    assert issubclass(CLASSES[name], CcamError)
    assert name in ccam.__all__
    assert getattr(ccam, name) is CLASSES[name]
    assert CLASSES[name].__dict__["__doc__"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("no such file", "no such file"),
        ("first\nsecond", "first"),
        ("Error at driver init: \n\nno driver\nmore", "Error at driver init: no driver"),
        ("alone:", "alone:"),
        ("", "ValueError"),
        ("x" * 300, "x" * 199 + "…"),
    ],
)
def test_an_error_is_one_line(words: str, expected: str) -> None:
    assert brief(ValueError(words)) == expected

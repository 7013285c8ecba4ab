"""Other libraries' errors, as part of a message."""

from __future__ import annotations

import pytest

from ccam_deploy.errors import brief


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

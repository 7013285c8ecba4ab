"""One line stays one line, and text that is safe stays as it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccam_deploy.text import markdown_table, one_line, text_table


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb.png", r"a\nb.png"),
        ("a\r\tb", r"a\r\tb"),
        ("\x1b[31mred\x9b", r"\x1b[31mred\x9b"),
        ("one\u2028two\u2029three\x85", r"one\u2028two\u2029three\x85"),
        (os.fsdecode(b"a\xff.png"), r"a\udcff.png"),
        (Path("photo of a cat, übergroß/猫 🐈‍⬛\u3000\u00a0.png"), None),
    ],
)
def test_by_hand(text: object, expected: str | None) -> None:
    assert one_line(text) == (str(text) if expected is None else expected)


@given(st.text(st.characters()))
def test_any_text_is_one_line_that_can_be_encoded(text: str) -> None:
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert one_line(line) == line
    line.encode("utf-8")


def test_text_tables_are_aligned_and_their_rows_one_line() -> None:
    assert text_table([["a\nb", "c"], ["d", "e"]]).splitlines() == [r"a\nb  c", "d     e"]
    assert text_table([]) == ""


def test_markdown_tables() -> None:
    rows = [("a|b", "1"), ("c\nd", "2")]
    assert markdown_table(("name", "n"), rows).splitlines() == [
        "| name | n |",
        "|---|---|",
        r"| a\|b | 1 |",
        r"| c\nd | 2 |",
    ]
    with pytest.raises(ValueError, match="a row has 1 cells, the header 2"):
        markdown_table(("name", "n"), [("a",)])

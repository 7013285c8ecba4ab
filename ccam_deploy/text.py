"""Text for terminals and Markdown: lines that stay lines, and tables."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

_BREAKING = ("Cc", "Cs", "Zl", "Zp")
"""Control characters, halves of surrogate pairs, line and paragraph separators."""


def one_line(text: object) -> str:
    r"""Escape whatever would break a line or steer a terminal.

    File names may hold any character but "/" and NUL: a line feed in one becomes "\n". Bytes of
    a name that are not text become "\udc80" and the like.

    Args:
        text: Anything that `str` turns into text.

    Returns:
        The text on one line, which can be encoded; text without such characters is unchanged.
    """
    return "".join(
        letter.encode("unicode_escape").decode() if _breaks(letter) else letter
        for letter in str(text)
    )


def _breaks(letter: str) -> bool:
    return unicodedata.category(letter) in _BREAKING


def text_table(rows: Iterable[Sequence[str]]) -> str:
    """Lay out rows of cells as a table with aligned columns, for a terminal.

    Args:
        rows: The cells of each row, as many in each; the header is a row like the others.

    Returns:
        One line for each row, joined by line feeds, without spaces at the ends of lines.
    """
    lines = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""Lay out rows of cells as a Markdown table.

    Args:
        header: The titles of the columns.
        rows: The cells of each row, as many as there are titles. "|" in a cell becomes "\|".

    Returns:
        The table's lines, joined by line feeds; columns are not padded.

    Raises:
        ValueError: A row has more or fewer cells than the header.
    """
    lines = [_markdown_line(header), "|---" * len(header) + "|"]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells, the header {len(header)}")
        lines.append(_markdown_line(row))
    return "\n".join(lines)


def _markdown_line(cells: Sequence[str]) -> str:
    shown = (one_line(cell).replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(shown)} |"

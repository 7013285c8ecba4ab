"""Text of any origin on one line."""

from __future__ import annotations

import unicodedata

_BREAKING = ("Cc", "Cs", "Zl", "Zp")
"""Control characters, halves of surrogate pairs, line and paragraph separators."""


def one_line(text: object) -> str:
    r"""Some text as one line; what would break the line or steer a terminal is shown escaped.

    File names may hold any character but "/" and NUL: a line feed in one becomes "\n". Bytes of
    a name that are no text become "\udc80" and the like.
    """
    return "".join(
        letter.encode("unicode_escape").decode() if _breaks(letter) else letter
        for letter in str(text)
    )


def _breaks(letter: str) -> bool:
    return unicodedata.category(letter) in _BREAKING

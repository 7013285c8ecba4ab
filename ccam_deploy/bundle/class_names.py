"""Classes by the names that people type."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache

from ccam_deploy.errors import TargetError
from ccam_deploy.text import one_line

_MOST_LISTED = 10
_MOST_MEANT = 5
_MOST_ALIKE = 3
_MOST_SHOWN = 40
_LONGEST = 200
"""The most letters of a name: no class has more, and to look for one that is alike takes long."""

Words = tuple[str, ...]


def named_class(name: str, labels: Sequence[str], partial: bool = True) -> int:
    """Find the number of a class by a name, or by its number in decimal digits.

    The first of these that fits any class decides: the label itself; a number; one of the names in
    the label, such as "tabby, tabby cat", whose letters and digits are those of `name`; with
    `partial`, one whose words are all in `name`, or that has all words of `name`. Case, spaces,
    underscores, hyphens and other punctuation do not count.

    Args:
        name: What was typed.
        labels: The name of each class, or none at all.
        partial: Whether a part of a label's words, or more than these, will do.

    Returns:
        The number; one that was typed may be out of range.

    Raises:
        TargetError: No class fits, or several do.
    """
    if len(name) > _LONGEST and name not in labels:
        start = one_line(name[:_MOST_SHOWN])
        raise TargetError(f'class "{start}…" is not in the bundle; it has {len(name)} letters')
    same = [index for index, label in enumerate(labels) if label == name]
    if same:
        return _only(same, name, labels)
    if re.fullmatch(r"[+-]?\d{1,18}", name):
        return int(name)
    words = _words(name)
    fits: list[Callable[[Words], bool]] = [lambda own: "".join(own) == "".join(words)]
    if partial:
        fits.append(lambda own: set(own) <= set(words) or set(own) >= set(words))
    for fit in fits if words else []:
        similar = [
            index for index, label in enumerate(labels) if any(fit(own) for own in _names(label))
        ]
        if similar:
            return _only(similar, name, labels)
    raise TargetError(f'class "{one_line(name)}" is not in the bundle{_suggestions(words, labels)}')


def _words(name: str) -> Words:
    """The words of a name, without what people spell in different ways."""
    return tuple(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", name).casefold()))


@lru_cache(maxsize=10_000)  # a data set looks up a class for each of its folders
def _names(label: str) -> tuple[Words, ...]:
    """The words of each name that a label gives, between commas."""
    return tuple(filter(None, map(_words, label.split(","))))


def _only(indices: Sequence[int], name: str, labels: Sequence[str]) -> int:
    if len(indices) == 1:
        return indices[0]
    shown = _listed(indices[:_MOST_MEANT], labels)
    more = len(indices) - _MOST_MEANT
    shown += f" and {more} more" if more > 0 else ""
    raise TargetError(f'the name "{one_line(name)}" stands for {shown}; give a number')


def _suggestions(words: Words, labels: Sequence[str]) -> str:
    """The end of an error's line: what the classes are, or which ones are spelled alike."""
    if not labels:
        return ", which has no class names; give a number"
    if len(labels) <= _MOST_LISTED:
        return f"; it has {', '.join(labels)}"
    classes = {" ".join(own): index for index, label in enumerate(labels) for own in _names(label)}
    alike = difflib.get_close_matches(" ".join(words), classes, len(classes))
    indices = list(dict.fromkeys(classes[text] for text in alike))[:_MOST_ALIKE]
    if not indices:
        return f", and none of its {len(labels)} names is like it; give a number"
    return f"; it has {_listed(indices, labels)}"


def _listed(indices: Sequence[int], labels: Sequence[str]) -> str:
    return ", ".join(f'{index} "{labels[index]}"' for index in indices)

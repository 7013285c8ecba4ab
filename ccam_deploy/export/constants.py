"""Values that are bound to inputs of a model, as people write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ccam_deploy.array_files import read_array
from ccam_deploy.errors import OptionError

_WORDS = {"true": True, "false": False, "none": None}


def parse_constant(text: str) -> tuple[str, Any]:
    """Read an input's name and its value.

    Args:
        text: "name=value", with a number, true, false, none, or the path of a .npy file.

    Returns:
        The name, and a number, a truth value, None or an array.

    Raises:
        OptionError: It is none of these, or the file cannot be read.
    """
    name, sign, value = (part.strip() for part in text.partition("="))
    if not name.isidentifier() or not sign or not value:
        raise OptionError(f'constant "{text}" is not name=value')
    if value.lower() in _WORDS:
        return name, _WORDS[value.lower()]
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    if not value.endswith(".npy"):
        raise OptionError(
            f'constant "{name}" is "{value}"; it must be a number, true, false, none or a .npy file'
        )
    return name, read_array(Path(value))

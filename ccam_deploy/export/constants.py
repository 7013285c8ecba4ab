"""Values that are bound to inputs of a model, as people write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

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
    try:
        array = np.load(Path(value), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise OptionError(f"{value} is not a .npy file that can be read") from error
    if not isinstance(array, np.ndarray):
        raise OptionError(f"{value} holds several arrays; it must hold one")
    return name, array

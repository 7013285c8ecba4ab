"""Methods whose options are words, as people type them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from ccam_deploy.errors import OptionError
from ccam_deploy.methods.base import Method

_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def method_from_words(method: type[Method], words: Mapping[str, str]) -> Method:
    """Make a method with its options.

    Args:
        method: The method.
        words: The options' values as text; layers are separated by commas.

    Raises:
        OptionError: A value is not one that the option takes.
    """
    values: dict[str, Any] = dict(words)
    if "layers" in values:
        values["layers"] = [part.strip() for part in values["layers"].split(",")]
    try:
        return msgspec.convert(values, method, strict=False)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, OptionError):  # the method's own refusal, which says it all
            raise error.__cause__ from error
        raise OptionError(_explain_refusal(str(error), method, values)) from error


def _explain_refusal(message: str, method: type[Any], values: Mapping[str, Any]) -> str:
    """What is wrong with an option's value, from msgspec's message."""
    match = re.fullmatch(r"(Expected `(\w+)`|Invalid enum value).* - at `\$\.(\w+)`", message)
    if not match or match[3] not in values:
        return f"an option has an unusable value: {message}"
    hint = get_type_hints(method)[match[3]]
    if get_origin(hint) is Literal:
        allowed = f"one of {', '.join(get_args(hint))}"
    else:
        allowed = _WORDS.get(match[2], match[2])
    return f'{match[3]} is "{values[match[3]]}"; it must be {allowed}'

"""Commands whose parameters are the fields of a dataclass.

A field's annotation holds what click needs to know, its default is the command's default, and a
field that is itself such a dataclass is a group of options that several commands share:

    Limit = Annotated[int | None, Option("--limit", "Use at most so many images.", click.INT)]

    @dataclass(frozen=True, kw_only=True)
    class ShowOptions:
        bundle: Bundle
        limit: Limit = unset("all")
        engine: EngineOptions

    @click.command()
    @with_options(ShowOptions)
    def show(options: ShowOptions) -> None: ...
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any, TypeVar, get_origin, get_type_hints

import click

OptionsT = TypeVar("OptionsT")
_SHOWN = "shown default"


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Attributes:
        flag: How it is written, such as "--limit"; a switch may be "--plots/--no-plots".
        help: One sentence.
        type: The values that click accepts; None for a switch and for plain text.
        metavar: What stands for the value in the help; None for the type's name.
        multiple: Whether the option may be repeated; the field is a tuple then.
    """

    flag: str
    help: str
    type: click.ParamType[Any] | None = None
    metavar: str | None = None
    multiple: bool = False


@dataclass(frozen=True)
class Argument:
    """An argument of a command.

    Attributes:
        type: The values that click accepts; None for plain text.
        many: Whether there may be several; the field is a tuple then.
    """

    type: click.ParamType[Any] | None = None
    many: bool = False


class Size(click.ParamType[tuple[int, int]]):
    """Height and width, "224x224" or "224"."""

    name = "HxW"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        """Parse "224x224" or "224"."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,4})(?:x(\d{1,4}))?", str(value).lower())
        if not match:
            self.fail(f'"{value}" is not a size such as 224x224', param, ctx)
        height, width = match.groups()
        return int(height), int(width or height)


class Number(click.FloatRange):
    """A finite number, within bounds where there are any."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Parse "0.5"."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number", param, ctx)
        return number


class Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers, separated by commas."""

    name = "A,B,C"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        """Parse "0.485,0.456,0.406"."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f'"{value}" is not a list of numbers such as 0.5,0.5,0.5', param, ctx)


class Integers(click.ParamType[tuple[int, ...]]):
    """Whole numbers, separated by commas."""

    name = "N,M"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        """Parse "1,8"."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f'"{value}" is not a list of whole numbers such as 1,8', param, ctx)


class Words(click.ParamType[tuple[str, ...]]):
    """Words, separated by commas; each counts once."""

    name = "A,B,C"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        """Parse "layer3, layer4"."""
        if isinstance(value, tuple):
            return value
        parts = (part.strip() for part in str(value).split(","))
        words = tuple(dict.fromkeys(part for part in parts if part))
        if not words:
            self.fail(f'"{value}" names nothing', param, ctx)
        return words


def unset(shown: str) -> Any:
    """Leave an option at None unless it is passed, and say in the help what happens then."""
    return dataclasses.field(default=None, metadata={_SHOWN: shown})


def with_options(
    options_type: type[OptionsT],
) -> Callable[[Callable[[OptionsT], None]], Callable[..., None]]:
    """Make a command's body, which takes a dataclass, a function for click.

    Args:
        options_type: A frozen dataclass; its fields, and those of its groups, are the parameters.

    Raises:
        TypeError: A field is neither an option, an argument nor a group.
    """

    def decorate(body: Callable[[OptionsT], None]) -> Callable[..., None]:
        @wraps(body)
        def command(**values: Any) -> None:
            body(_build(options_type, values))

        for decorator in reversed(list(_decorators(options_type))):
            decorator(command)
        return command

    return decorate


def _definitions(options_type: type[Any]) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """Each field with its Option or Argument, or the dataclass that it groups."""
    hints = get_type_hints(options_type, include_extras=True)
    for field in dataclasses.fields(options_type):
        hint = hints[field.name]
        if get_origin(hint) is Annotated:
            yield field, hint.__metadata__[0]
        elif dataclasses.is_dataclass(hint):
            yield field, hint
        else:
            raise TypeError(f"{options_type.__name__}.{field.name} is no option, argument or group")


def _decorators(options_type: type[Any]) -> Iterator[Callable[[Any], Any]]:
    for field, definition in _definitions(options_type):
        if isinstance(definition, Option):
            yield _option(field, definition)
        elif isinstance(definition, Argument):
            yield click.argument(
                field.name,
                type=definition.type,
                nargs=-1 if definition.many else 1,
                required=field.default is dataclasses.MISSING,
            )
        else:
            yield from _decorators(definition)


def _option(field: dataclasses.Field[Any], definition: Option) -> Callable[[Any], Any]:
    attributes: dict[str, Any] = {
        "help": definition.help,
        "show_default": field.metadata.get(_SHOWN, True),
        "multiple": definition.multiple,
    }
    if field.default is dataclasses.MISSING:
        attributes["required"] = True
    else:
        attributes["default"] = field.default
    if isinstance(field.default, bool):
        attributes["is_flag"] = True
    else:
        attributes |= {"type": definition.type, "metavar": definition.metavar}
    return click.option(definition.flag, field.name, **attributes)


def _build(options_type: type[OptionsT], values: Mapping[str, Any]) -> OptionsT:
    parts = {
        field.name: values[field.name]
        if isinstance(definition, Option | Argument)
        else _build(definition, values)
        for field, definition in _definitions(options_type)
    }
    return options_type(**parts)

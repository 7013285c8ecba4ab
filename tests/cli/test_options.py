"""One meaning, one type and one help text for an option, in whatever commands have it."""

from __future__ import annotations

import dataclasses
import typing
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import click
import pytest

from ccam_deploy.cli.options import EngineOptions, LookOptions
from ccam_deploy.cli.parameters import with_options
from tests.command import all_commands

COMMANDS = all_commands()
VARYING = ("default", "name", "required", "show_default")
"""What may differ between the commands that have an option; the field's name is not shown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShowOptions:
    look: LookOptions
    engine: EngineOptions


@dataclasses.dataclass(frozen=True)
class Plain:
    limit: int = 0


def options() -> Iterator[tuple[str, click.Option]]:
    """Every option with its command's name."""
    for name, command in COMMANDS.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                yield name, parameter


def definition(option: click.Option) -> dict[str, Any]:
    """All that is declared of an option but its default, and what --output is for a command."""
    facts = {key: value for key, value in option.to_info_dict().items() if key not in VARYING}
    if "--output" in option.opts:
        facts["help"] = facts["help"].partition(":")[0]
    return {**facts, "metavar": option.metavar}


def test_an_option_is_the_same_in_all_commands() -> None:
    by_flag: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for command, option in options():
        for flag in (*option.opts, *option.secondary_opts):
            by_flag[flag][command] = definition(option)
    assert len(by_flag["--output"]) == 7
    for flag, users in by_flag.items():
        first, *others = users.values()
        for other in others:
            assert other == first, f"{flag} differs between {', '.join(users)}"


def test_output_says_what_a_command_writes() -> None:
    """And says it of the same results in all of them."""
    places = {
        command: str(option.help).removeprefix("Where to write the results: ")
        for command, option in options()
        if "--output" in option.opts
    }
    assert places == {
        "bench": "a JSON file.",
        "compare": "a .png file.",
        "evaluate": "a folder.",
        "explain": "a folder.",
        "export": "the folder of the bundle.",
        "propose": "a folder.",
        "sanity": "a folder.",
    }


def test_every_option_has_one_plain_sentence_or_two() -> None:
    for command, option in options():
        text = option.help or ""
        assert text.endswith("."), f"{command} {option.opts[0]}"
        assert text[:1].isupper(), f"{command} {option.opts[0]}"
        assert len(text) <= 200, f"{command} {option.opts[0]}"


def test_names_mean_the_same_type_everywhere() -> None:
    """--json takes no value; --output is a path, --layers names, --limit a number."""
    flags = defaultdict(set)
    for _, option in options():
        flags[option.opts[0]].add(option.is_flag)
        if option.opts[0] == "--limit":
            assert isinstance(option.type, click.IntRange)
        if option.opts[0] == "--output":
            assert isinstance(option.type, click.Path)
    assert flags["--json"] == {True}
    assert flags["--output"] == flags["--layers"] == flags["--limit"] == {False}


def leaves(options_type: type[Any]) -> list[str]:
    """Names of the fields of a dataclass and of the dataclasses in it."""
    names = []
    for name, hint in typing.get_type_hints(options_type).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            names += leaves(hint)
        else:
            names.append(name)
    return names


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_body_takes_a_dataclass_of_its_parameters(command: click.Command) -> None:
    body = typing.cast(Any, command.callback).__wrapped__
    hints = typing.get_type_hints(body)
    assert hints.pop("return") is type(None)
    options_type: Any
    (options_type,) = hints.values()
    assert isinstance(options_type, type)
    assert dataclasses.is_dataclass(options_type)
    assert vars(options_type)["__dataclass_params__"].frozen
    names = [str(parameter.name) for parameter in command.params]
    assert sorted(leaves(options_type)) == sorted(names)
    assert len(set(names)) == len(names)


def test_values_arrive_in_the_dataclass() -> None:
    """Of groups too, with the defaults of the fields."""
    shown = []

    @click.command()
    @with_options(ShowOptions)
    def show(options: ShowOptions) -> None:
        shown.append(options)

    show(["--threads", "2", "--opacity", "0.25"], standalone_mode=False)
    (got,) = shown
    assert got == ShowOptions(look=LookOptions(opacity=0.25), engine=EngineOptions(threads=2))


def test_a_field_that_is_no_option_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Plain\.limit is no option, argument or group"):
        with_options(Plain)(lambda options: None)

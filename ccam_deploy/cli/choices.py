"""What a command's options choose: an explainer, methods with their options, classes."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import click

from ccam_deploy.cli.options import BATCH_SIZE, parse_assignments, say
from ccam_deploy.errors import ImageError, OptionError

if TYPE_CHECKING:
    from PIL import Image

    from ccam_deploy.bundle.manifest import Manifest
    from ccam_deploy.explainer import Explainer
    from ccam_deploy.methods import Method
    from ccam_deploy.targets import Target

_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def make_methods(names: Sequence[str], pairs: Sequence[str]) -> dict[str, Method]:
    """Each named method with its options.

    pairs: METHOD:KEY=VALUE for one method, KEY=VALUE for each that has the option.
    Raises OptionError for an unknown method, option or value.
    """
    from ccam_deploy.methods import method_named

    kinds = {name: method_named(name) for name in names}
    given: dict[str, dict[str, str]] = {name: {} for name in kinds}
    for word, value in parse_assignments(pairs).items():
        method, colon, key = word.rpartition(":")
        if colon and method not in kinds:
            raise OptionError(
                f'option "{word}" is for method "{method}"; the methods are {", ".join(kinds)}'
            )
        wanted = {method: kinds[method]} if colon else kinds
        takers = [name for name, kind in wanted.items() if key in _keys(kind)]
        if not takers:
            known = "; ".join(f"{name} has {', '.join(_keys(wanted[name]))}" for name in wanted)
            raise OptionError(f'option "{key}" is unknown; {known}')
        for name in takers:
            given[name][key] = value
    return {name: _converted(kind, given[name]) for name, kind in kinds.items()}


def best(word: str) -> int | None:
    """N of topN, the N best classes; None for the number or name of a class."""
    match = re.fullmatch(r"top(\d{1,9})", word)
    return int(match[1]) if match else None


def targets_of(words: Sequence[str], manifest: Manifest) -> list[Target]:
    """Turn the words of --target into targets: topN into the N best classes.

    Raises:
        TargetError: A class is not in the bundle.
    """
    from ccam_deploy.targets import Top

    targets: list[Target] = []
    for word in words:
        count = best(word)
        targets.append(manifest.class_index(word) if count is None else Top(count))
    return targets


@contextmanager
def explainer_of(
    bundle: Path, options: Mapping[str, Any], batch_size: int = BATCH_SIZE
) -> Iterator[Explainer]:
    """Open a bundle as --backend, --precision and --threads say.

    Prints on stderr what is not as asked, before and after, and that random weights mean nothing.
    """
    from ccam_deploy.explainer import load

    with load(
        bundle,
        backend=options["backend"],
        precision=options["precision"],
        batch_size=batch_size,
        threads=options["threads"],
    ) as explainer:
        for note in explainer.networks.notes:
            say(f"passed over {note}", err=True)
        if explainer.bundle.manifest.random_weights:
            say("warning: the bundle has random weights; its maps mean nothing", err=True)
        yield explainer
        for note in explainer.notes[len(explainer.networks.notes) :]:
            say(note, err=True)


@contextmanager
def progress(label: str, length: int) -> Iterator[Any]:
    """A progress bar on stderr, where stderr is a terminal."""
    hidden = not sys.stderr.isatty()
    with click.progressbar(length=length, label=label, file=sys.stderr, hidden=hidden) as bar:
        yield bar


def read_picture(file: Path, manifest: Manifest) -> Image.Image:
    """A file as an RGB picture. Raises ImageError, naming the file, where the bundle takes none."""
    from ccam_deploy.image_files import load_image
    from ccam_deploy.preprocess import input_geometry, to_grey_or_rgb

    picture = load_image(file)
    try:
        input_geometry(picture.size[::-1], manifest.input[1:], manifest.preprocessing)
        return to_grey_or_rgb(picture, 3)
    except ImageError as error:
        raise ImageError(f"{file}: {error}") from error


def _keys(kind: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _converted(kind: type[Method], given: Mapping[str, str]) -> Method:
    import msgspec

    values: dict[str, Any] = dict(given)
    if "layers" in values:
        values["layers"] = [part.strip() for part in values["layers"].split(",")]
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise OptionError(_explained(str(error), kind, values)) from error


def _explained(words: str, kind: type[Any], values: Mapping[str, Any]) -> str:
    """What is wrong with an option's value, from msgspec's words."""
    match = re.fullmatch(r"(Expected `(\w+)`|Invalid enum value).* - at `\$\.(\w+)`", words)
    if not match or match[3] not in values:
        return f"an option has an unusable value: {words}"
    hint = get_type_hints(kind)[match[3]]
    if get_origin(hint) is Literal:
        wanted = f"one of {', '.join(get_args(hint))}"
    else:
        wanted = _WORDS.get(match[2], match[2])
    return f'{match[3]} is "{values[match[3]]}"; it must be {wanted}'

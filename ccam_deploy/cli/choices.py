"""What commands make of their options: an explainer, methods, classes, pictures."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ccam_deploy.cli.options import EngineOptions, parse_assignments
from ccam_deploy.cli.printing import say
from ccam_deploy.errors import ImageError, OptionError

if TYPE_CHECKING:
    from PIL import Image

    from ccam_deploy.bundle.manifest import Manifest
    from ccam_deploy.explainer import Explainer
    from ccam_deploy.methods import Method
    from ccam_deploy.targets import Target


def make_methods(names: Sequence[str], pairs: Sequence[str]) -> dict[str, Method]:
    """Make each named method with its options.

    Args:
        names: Names of methods.
        pairs: METHOD:KEY=VALUE for one method, KEY=VALUE for each that has the option.

    Returns:
        The methods by their names.

    Raises:
        OptionError: A method, an option or a value is unknown.
    """
    from ccam_deploy.methods import method_named
    from ccam_deploy.methods.from_words import method_from_words

    types = {name: method_named(name) for name in names}
    values: dict[str, dict[str, str]] = {name: {} for name in types}
    for word, value in parse_assignments(pairs).items():
        method, colon, key = word.rpartition(":")
        if colon and method not in types:
            raise OptionError(
                f'option "{word}" is for method "{method}", which is not asked for here; '
                f"asked for: {', '.join(types)}"
            )
        candidates = [method] if colon else list(types)
        takers = [name for name in candidates if key in _keys(types[name])]
        if not takers:
            known = "; ".join(f"{name} has {', '.join(_keys(types[name]))}" for name in candidates)
            raise OptionError(f'option "{key}" is unknown; {known}')
        for name in takers:
            values[name][key] = value
    return {name: method_from_words(method, values[name]) for name, method in types.items()}


def parse_targets(words: Sequence[str], manifest: Manifest) -> list[Target]:
    """Turn the words of --target into targets: topN into the N best classes.

    Raises:
        TargetError: A class is not in the bundle.
    """
    from ccam_deploy.targets import Top

    targets: list[Target] = []
    for word in words:
        match = re.fullmatch(r"top(\d{1,9})", word)
        targets.append(Top(int(match[1])) if match else manifest.class_index(word))
    return targets


@contextmanager
def open_explainer(bundle: Path, engine: EngineOptions) -> Iterator[Explainer]:
    """Open a bundle as the options say, and close it at the end of the block.

    Prints notes on stderr: a backend that was skipped, random weights, and at the end what
    ran slower or otherwise than asked.

    Yields:
        The explainer.

    Raises:
        BundleError: The bundle is damaged or not one, or not signed as required.
        BackendError: The backend does not work here.
    """
    from ccam_deploy.explainer import load

    with load(
        bundle,
        backend=engine.backend,
        precision=engine.precision,
        batch_size=engine.batch_size,
        threads=engine.threads,
        require_signature=engine.require_signature,
    ) as explainer:
        for note in explainer.networks.notes:
            say(f"skipped {note}", err=True)
        warn_of_random_weights(explainer.bundle.manifest)
        yield explainer
        for note in explainer.notes[len(explainer.networks.notes) :]:
            say(note, err=True)


def warn_of_random_weights(manifest: Manifest) -> None:
    """Say it where a bundle's network was not trained."""
    from ccam_deploy.bundle.manifest import RANDOM_WEIGHTS

    if manifest.random_weights:
        say(f"warning: {RANDOM_WEIGHTS}", err=True)


def find_inputs(images: Sequence[Path], output: Path) -> list[Path]:
    """Find the image files to explain, but none that an earlier run wrote.

    Args:
        images: Files, and folders that are searched through.
        output: The folder for results; images found in it are left out.

    Raises:
        ImageError: A path does not exist, or a folder holds no images.
        OptionError: A path is a bundle, or a folder of images is the folder for results too.
    """
    from ccam_deploy.bundle.staging import holds_bundle
    from ccam_deploy.image_files import find_images

    place = output.resolve()
    files = []
    for path in images:
        if path.is_dir() and holds_bundle(path):
            raise OptionError(f"{path} is a bundle; give the bundle first, then the images")
        pictures = find_images([path])
        if path.is_dir():
            if path.resolve() == place:
                raise OptionError(
                    f"--output {output} is the folder of the images too; give another one, or the "
                    "next run explains what this one writes"
                )
            inside = path.resolve() in place.parents
            pictures = [f for f in pictures if not (inside and place in f.resolve().parents)]
            if not pictures:
                raise ImageError(f"{path} holds no images but those in --output {output}")
        files += pictures
    return files


def read_picture(file: Path, manifest: Manifest) -> Image.Image:
    """Read a file as an RGB picture that a bundle's network can take.

    Raises:
        ImageError: The file cannot be read, or the network cannot take it; it is named.
    """
    from ccam_deploy import preprocess

    return preprocess.read_picture(file, manifest, str(file))


def _keys(method: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(method)]

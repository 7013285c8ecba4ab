"""The network that a command's options name."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ccam_deploy.cli.options import Command, say
from ccam_deploy.errors import ExportError, OptionError

if TYPE_CHECKING:
    from ccam_deploy.export import Recipe
    from ccam_deploy.export.architecture import Model
    from ccam_deploy.export.settings import ExportSettings


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


@dataclass(frozen=True)
class Prepared:
    """A network, how an export of it is set, and the recipe if there is one."""

    network: Model
    settings: ExportSettings
    recipe: Recipe | None

    def input_size(self, wanted: tuple[int, int] | None) -> tuple[int, int] | None:
        """Height and width of the input: those wanted, else the recipe's."""
        return wanted or (self.recipe.input.size if self.recipe else None)

    def layers(self, words: str | None) -> list[str] | None:
        """Names of the target layers: those of an option, else the recipe's; None for neither."""
        if words:
            return [part.strip() for part in words.split(",")]
        return list(self.recipe.layers) or None if self.recipe else None


def model_options(command: Command) -> Command:
    """MODEL, --arch, --recipe and what else says how a network is loaded and what it takes."""
    for option in (
        click.option(
            "--allow-pickle",
            is_flag=True,
            help="Read pickled objects; this runs whatever code the file holds.",
        ),
        click.option(
            "--cover",
            type=Size(),
            help="With crop: the size that an image is scaled to cover "
            "before its middle is cut out.  [default: the recipe's, else the input's size / 0.875]",
        ),
        click.option(
            "--resize",
            type=click.Choice(["crop", "stretch"]),
            help="How images get the input's shape: cut out the middle, or distort.  "
            "[default: crop]",
        ),
        click.option(
            "--std",
            type=Numbers(),
            help="Standard deviation of each channel.  [default: ImageNet's]",
        ),
        click.option(
            "--mean",
            type=Numbers(),
            help="Mean of each channel, of pixels in [0, 1].  [default: ImageNet's]",
        ),
        click.option(
            "--input-size",
            type=Size(),
            help="Height x width of the input.  [default: 224x224, or the program's]",
        ),
        click.option(
            "--recipe",
            "recipe_path",
            type=click.Path(path_type=Path),
            help="A TOML file that describes the network; see export/.",
        ),
        click.option(
            "--arch",
            help="The network of a file of weights: module:factory, or "
            "module:factory(argument=value).",
        ),
        click.argument("model", required=False, type=click.Path(path_type=Path)),
    ):
        command = option(command)
    return command


def prepare(
    path: Path | None,
    options: Mapping[str, Any],
    images: Sequence[Path],
    random_weights: bool = False,
) -> Prepared:
    """Load the network that the options of `model_options` name.

    images: files and folders that take the place of the recipe's calibration images.
    Raises OptionError for options that do not go together, SourceError for a model that cannot be
    had.
    """
    from dataclasses import replace

    from ccam_deploy.export import ExportSettings
    from ccam_deploy.export.recipe import read_recipe, recipe_settings
    from ccam_deploy.export.settings import MAX_CALIBRATION_IMAGES
    from ccam_deploy.image_files import find_images, load_image

    recipe, folder = None, Path()
    settings = ExportSettings()
    changes: dict[str, Any] = {
        key: options[key] for key in ("mean", "std", "resize", "cover") if options[key] is not None
    }
    if options["recipe_path"]:
        recipe = read_recipe(options["recipe_path"])
        folder = options["recipe_path"].parent
        settings = recipe_settings(recipe, folder, options["input_size"])
    if options["cover"] and (options["resize"] or settings.resize) == "stretch":
        raise OptionError("--cover goes with --resize crop; stretch scales to the input's size")
    arch, allow_pickle = options["arch"], options["allow_pickle"]
    network = load_network(path, recipe, folder, arch, random_weights, allow_pickle)
    if path is not None:
        changes |= {"name": path.stem if not recipe else recipe.name, "source": path.name}
    elif random_weights and recipe:
        changes |= {"random_weights": True, "tolerance": {}}
    if images:
        found = find_images(images)
        changes["calibration"] = [load_image(file) for file in found[:MAX_CALIBRATION_IMAGES]]
    changes["progress"] = lambda line: say(line, err=True)
    return Prepared(network, replace(settings, **changes), recipe)


def load_network(
    path: Path | None,
    recipe: Recipe | None,
    folder: Path,
    arch: str | None,
    random_weights: bool,
    allow_pickle: bool,
) -> Model:
    """Load a model file, or make a recipe's own network.

    folder: where the recipe lies.   Raises OptionError for options that do not go together,
    SourceError for a model that cannot be had.
    """
    from ccam_deploy.export.recipe import random_model, recipe_model
    from ccam_deploy.export.sources import load_model, model_file_type

    if random_weights and (path or not recipe):
        raise OptionError("--random-weights goes with --recipe and without a model file")
    for option, given in (("--arch", arch), ("--allow-pickle", allow_pickle)):
        if given and path is None:
            raise OptionError(f"{option} goes with a model file; there is none")
    if path is not None:
        if arch and model_file_type(path) != "weights":
            raise OptionError(f"--arch goes with a file of weights; {path} has its own network")
        return load_model(
            path,
            arch or (recipe.arch if recipe else None),
            allow_pickle,
            lambda line: say(f"warning: {line}", err=True),
        )
    if recipe is None:
        raise OptionError("give a model file, or a --recipe that names its own network")
    with contextlib.redirect_stdout(sys.stderr):  # where PyTorch tells of a download
        return random_model(recipe) if random_weights else recipe_model(recipe, folder)


def need_torch(purpose: str, extras: str) -> None:
    """Raise ExportError, naming what to install, where the export part cannot be imported."""
    try:
        import onnx_ir  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"{purpose} needs {error.name}: pip install 'ccam-deploy[{extras}]'"
        ) from error

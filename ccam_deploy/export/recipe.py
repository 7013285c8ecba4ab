"""Recipes: how one architecture is exported, in a TOML file."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from torch import nn

from ccam_deploy.bundle.manifest import (
    Activation,
    GraphPrecision,
    Interpolation,
    Positive,
    PrecisionName,
    Preprocessing,
    Resize,
)
from ccam_deploy.errors import OptionError, SourceError, brief
from ccam_deploy.examples.photographs import photographs
from ccam_deploy.export.architecture import build_model, import_module
from ccam_deploy.export.settings import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_CALIBRATION_IMAGES,
    ExportSettings,
    Half,
)
from ccam_deploy.export.sources import load_model
from ccam_deploy.extras import Extra, install
from ccam_deploy.image_files import find_images, load_image
from ccam_deploy.preprocess import prepare_images

_SEED = 0
Bound = Annotated[float, msgspec.Meta(ge=0)]


class InputTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The recipe's table [input].

    Attributes:
        size: Height and width in pixels.
        mean: Per channel; see ExportSettings, like all below.
        std: Per channel.
        resize: How images get the input's shape.
        cover: Height and width that an image is scaled to cover.
        interpolation: The filter that scales images.
    """

    size: tuple[Positive, Positive]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize: Resize = "crop"
    cover: tuple[int, int] | None = None
    interpolation: Interpolation = "bilinear"


class Recipe(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How to export one architecture.

    Attributes:
        name: The bundle's name, and that of its folder.
        arch: "module:factory"; see build_model.
        input: What the network takes.
        weights: A file beside the recipe; or "package:pattern", the one file of an installed
            package that has a path like this, such as "some_model:models/*.pth".
        pretrained: Arguments of the factory that download trained weights.
        activation: See ExportSettings.
        labels: Class names; or a text file beside the recipe with one per line; or
            "module:weights", torchvision's weights that list them.
        layers: Names of the target layers; found automatically where empty.
        precision: See export.
        calibration: A folder of images beside the recipe.
        half: See ExportSettings.
        tolerance: See ExportSettings.
        extra: The extra that adds the packages which the recipe names.
    """

    name: str
    arch: str
    input: InputTable
    weights: str = ""
    pretrained: dict[str, str] = {}
    activation: Activation | None = None
    labels: list[str] | str = []
    layers: list[str] = []
    precision: PrecisionName = "fp32"
    calibration: str = ""
    half: Half = "all"
    tolerance: dict[GraphPrecision, dict[str, Bound]] = {}
    extra: Extra | None = None


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Args:
        path: The TOML file.

    Returns:
        The recipe.

    Raises:
        OptionError: The file is missing or not a recipe, or its name would lead out of the folder
            of bundles.
    """
    try:
        recipe = msgspec.toml.decode(path.read_bytes(), type=Recipe)
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise OptionError(f"{path} is not a valid recipe: {brief(error)}") from error
    if not _is_file_name(recipe.name):
        raise OptionError(
            f'{path} is not a valid recipe: name is "{recipe.name}"; '
            "it must do as the name of a folder"
        )
    return recipe


def _is_file_name(name: str) -> bool:
    """Whether a name leads to a place inside of a folder, however it is joined to it."""
    return name not in ("", ".", "..") and not any(sign in name for sign in "/\\\0")


def recipe_settings(
    recipe: Recipe, folder: Path, size: tuple[int, int] | None = None
) -> ExportSettings:
    """Make the settings of a recipe's export.

    Args:
        recipe: The recipe.
        folder: The folder that the recipe lies in.
        size: Height and width of the input, by default the recipe's; `cover` scales with them.

    Returns:
        The settings, with labels and calibration images read.

    Raises:
        OptionError: The labels cannot be read.
    """
    calibration = []
    if recipe.calibration:
        paths = find_images([folder / recipe.calibration])
        calibration = [load_image(path) for path in paths[:MAX_CALIBRATION_IMAGES]]
    return ExportSettings(
        mean=recipe.input.mean,
        std=recipe.input.std,
        resize=recipe.input.resize,
        cover=_cover(recipe.input, size or recipe.input.size),
        interpolation=recipe.input.interpolation,
        activation=recipe.activation,
        labels=_labels(recipe, folder),
        calibration=calibration,
        tolerance=recipe.tolerance,
        half=recipe.half,
        name=recipe.name,
        source=recipe.arch,
    )


def _cover(table: InputTable, size: tuple[int, int]) -> tuple[int, int] | None:
    if table.cover is None:
        return None
    height, width = (
        round(cover * side / recipe_side)
        for cover, side, recipe_side in zip(table.cover, size, table.size, strict=True)
    )
    return height, width


def recipe_model(recipe: Recipe, folder: Path) -> nn.Module:
    """Make a recipe's network with its trained weights, from a file or by download.

    Args:
        recipe: The recipe.
        folder: The folder that the recipe lies in.

    Returns:
        The network.

    Raises:
        SourceError: The recipe names no weights, or they cannot be read or downloaded, or a
            package that it names is missing.
    """
    with _naming_extra(recipe):
        if recipe.weights:
            loaded = load_model(_weights_file(recipe.weights, folder), recipe.arch)
            if not isinstance(loaded, nn.Module):
                raise SourceError(
                    f'weights "{recipe.weights}" are a whole program; export that by itself'
                )
            return loaded
        if not recipe.pretrained:
            raise SourceError(
                f"the recipe {recipe.name} has no trained weights; use --random-weights"
            )
        arguments = ", ".join(f"{key}={value!r}" for key, value in recipe.pretrained.items())
        import_module(recipe.arch.partition(":")[0])
        try:
            return build_model(f"{recipe.arch}({arguments})")
        except SourceError as error:
            raise SourceError(
                f"{error}; without an internet connection use --random-weights"
            ) from error


@contextmanager
def _naming_extra(recipe: Recipe) -> Iterator[None]:
    """Tell what installs a package that the recipe names and that is missing."""
    try:
        yield
    except SourceError as error:
        missing = isinstance(error.__cause__, ModuleNotFoundError)
        if recipe.extra is None or not missing or install(recipe.extra) in str(error):
            raise
        raise SourceError(f"{error}; {install(recipe.extra)}") from error.__cause__


def _weights_file(weights: str, folder: Path) -> Path:
    """The file that a recipe's `weights` names, beside the recipe or in a package."""
    package, colon, pattern = weights.partition(":")
    if not colon:
        return folder / weights
    folders = _package_folders(package)
    try:
        files = [file for root in folders for file in sorted(root.glob(pattern))]
    except (ValueError, NotImplementedError) as error:
        raise SourceError(f'weights "{weights}" name no files: {brief(error)}') from error
    if len(files) != 1:
        raise SourceError(
            f'weights "{weights}" name {len(files) or "no"} files of the package, not one'
        )
    return files[0]


def _package_folders(package: str) -> list[Path]:
    """The folders of an installed package, which is not imported for that."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.submodule_search_locations is None:
        raise SourceError(
            f'package "{package}", which has the weights, is missing'
        ) from ModuleNotFoundError(package)
    return [Path(location) for location in spec.submodule_search_locations]


def random_model(recipe: Recipe) -> nn.Module:
    """Make a recipe's network with seeded random weights.

    Its normalisation layers take the statistics of real images: with their initial ones the signal
    of a deep network fades or explodes.

    Args:
        recipe: The recipe.

    Returns:
        The network in evaluation mode, the same every time.

    Raises:
        SourceError: The network cannot be built, or does not run on the recipe's input.
    """
    with torch.random.fork_rng(devices=[]), _naming_extra(recipe):
        torch.manual_seed(_SEED)
        network = build_model(recipe.arch)
        _set_statistics(network, recipe)
    return network.eval()


def _set_statistics(network: nn.Module, recipe: Recipe) -> None:
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    size, mean, std = recipe.input.size, recipe.input.mean, recipe.input.std
    preprocessing = Preprocessing("stretch", size, "bicubic", mean, std)
    batch = torch.from_numpy(prepare_images(photographs(), size, preprocessing)[0])
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    network.train()
    try:
        with torch.no_grad():
            network(torch.cat([batch, batch.flip(3)]))
    except Exception as error:
        raise SourceError(
            f"{recipe.arch} does not run on images of {list(batch.shape[1:])}: {brief(error)}"
        ) from error


def _labels(recipe: Recipe, folder: Path) -> tuple[str, ...]:
    """Names of the classes: the recipe's, a text file's, or those of "module:weights"."""
    if not isinstance(recipe.labels, str):
        return tuple(recipe.labels)
    if ":" in recipe.labels:
        module_name, _, attribute = recipe.labels.partition(":")
        with _naming_extra(recipe):
            weights = getattr(import_module(module_name), attribute, None)
        default = getattr(weights, "DEFAULT", None)
        if default is None:
            raise OptionError(f'labels "{recipe.labels}" do not exist')
        return tuple(default.meta["categories"])
    return read_labels(folder / recipe.labels)


def read_labels(path: Path) -> tuple[str, ...]:
    """Read the names of the classes from a text file.

    Args:
        path: The file, with one name per line in the order of the logits.

    Returns:
        The names, without empty lines.

    Raises:
        OptionError: The file cannot be read, or holds no names.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise OptionError(f"{path} cannot be read as labels: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is not a text in UTF-8; save it as one") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise OptionError(f"{path} holds no labels; give one a line")
    return names

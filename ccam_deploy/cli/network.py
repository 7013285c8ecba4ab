"""The PyTorch network that a command's options name."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ccam_deploy.cli.options import InputOptions, ModelSource
from ccam_deploy.cli.printing import say
from ccam_deploy.errors import ExportError, OptionError
from ccam_deploy.extras import Extra, install

if TYPE_CHECKING:
    from ccam_deploy.export import Recipe
    from ccam_deploy.export.architecture import Model
    from ccam_deploy.export.settings import ExportSettings


@dataclass(frozen=True)
class PreparedModel:
    """A network that is ready for export.

    Attributes:
        network: The PyTorch module or program.
        settings: How its export is set.
        recipe: The recipe that describes it, if there is one.
        input_size: Height and width of the input; None leaves them to the network.
    """

    network: Model
    settings: ExportSettings
    recipe: Recipe | None
    input_size: tuple[int, int] | None

    def target_layers(self, names: Sequence[str] | None) -> list[str] | None:
        """Return the names of the target layers.

        Args:
            names: Those of an option; None for the recipe's.

        Returns:
            None where neither the option nor the recipe names any.
        """
        if names:
            return list(names)
        return list(self.recipe.layers) or None if self.recipe else None


def prepare_model(
    path: Path | None, source: ModelSource, inputs: InputOptions, images: Sequence[Path] = ()
) -> PreparedModel:
    """Load a network, and set its export as the options say.

    Args:
        path: The model file; None for the recipe's own network.
        source: Where the network comes from.
        inputs: What it takes as its input.
        images: Files and folders that take the place of the recipe's calibration images.

    Raises:
        OptionError: Some options do not go together.
        SourceError: The model cannot be loaded.
    """
    from dataclasses import replace

    from ccam_deploy.export import ExportSettings
    from ccam_deploy.export.recipe import read_recipe, recipe_settings
    from ccam_deploy.export.settings import MAX_CALIBRATION_IMAGES
    from ccam_deploy.image_files import find_images, load_image

    recipe = None
    settings = ExportSettings()
    if source.recipe:
        recipe = read_recipe(source.recipe)
        settings = recipe_settings(recipe, source.recipe.parent, inputs.input_size)
    values = {name: getattr(inputs, name) for name in ("mean", "std", "resize", "cover")}
    changes: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    if inputs.cover and (inputs.resize or settings.resize) == "stretch":
        raise OptionError("--cover goes with --resize crop; stretch scales to the input's size")
    network = load_network(path, recipe, source)
    if path is not None:
        changes |= {"name": path.stem if not recipe else recipe.name, "source": path.name}
    elif source.random_weights:
        changes |= {"random_weights": True, "tolerance": {}}
    if images:
        files = find_images(images)[:MAX_CALIBRATION_IMAGES]
        changes["calibration"] = [load_image(file) for file in files]
    changes["progress"] = lambda line: say(line, err=True)
    size = inputs.input_size or (recipe.input.size if recipe else None)
    return PreparedModel(network, replace(settings, **changes), recipe, size)


def load_network(path: Path | None, recipe: Recipe | None, source: ModelSource) -> Model:
    """Load a model file, or make a recipe's own network.

    Raises:
        OptionError: Some options do not go together.
        SourceError: The model cannot be loaded.
    """
    from ccam_deploy.export.recipe import random_model, recipe_model
    from ccam_deploy.export.sources import load_model, model_file_type

    if source.random_weights and (path or not recipe):
        raise OptionError("--random-weights goes with --recipe and without a model file")
    for option, value in (("--arch", source.arch), ("--allow-pickle", source.allow_pickle)):
        if value and path is None:
            raise OptionError(f"{option} goes with a model file; there is none")
    if path is not None:
        if source.arch and model_file_type(path) != "weights":
            raise OptionError(f"--arch goes with a file of weights; {path} has its own network")
        return load_model(
            path,
            source.arch or (recipe.arch if recipe else None),
            source.allow_pickle,
            lambda line: say(f"warning: {line}", err=True),
        )
    if recipe is None or source.recipe is None:
        raise OptionError("give a model file, or a --recipe that names its own network")
    with contextlib.redirect_stdout(sys.stderr):  # where PyTorch reports a download
        if source.random_weights:
            return random_model(recipe)
        return recipe_model(recipe, source.recipe.parent)


def validate_image_limit(limit: int | None, consumer: str) -> None:
    """Refuse a --limit above the number of calibration images that an export can take.

    Args:
        limit: The option's value, if it was passed.
        consumer: What takes the images, for the message.

    Raises:
        OptionError: The limit is too high.
    """
    from ccam_deploy.export.settings import MAX_CALIBRATION_IMAGES

    if limit is not None and limit > MAX_CALIBRATION_IMAGES:
        raise OptionError(f"--limit is {limit}; {consumer} takes at most {MAX_CALIBRATION_IMAGES}")


def require_torch(purpose: str, *extras: Extra) -> None:
    """Make sure that the libraries of the export can be imported.

    Raises:
        ExportError: One cannot; the message names the extras to install.
    """
    try:
        import onnx_ir  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        # Two packages of ONNX Runtime would overwrite each other's files.
        has_runtime = importlib.util.find_spec("onnxruntime") is not None
        missing = [extra for extra in extras if extra != "cpu" or not has_runtime]
        raise ExportError(f"{purpose} needs {error.name}: {install(*missing)}") from error

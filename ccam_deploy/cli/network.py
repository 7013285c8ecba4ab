"""The network that a command's options name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ccam_deploy.errors import ExportError, OptionError

if TYPE_CHECKING:
    from ccam_deploy.export import Recipe
    from ccam_deploy.export.sources import Model


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
    from ccam_deploy.export import recipe as recipes
    from ccam_deploy.export import sources

    if random_weights and (path or not recipe):
        raise OptionError("--random-weights goes with --recipe and without a model file")
    for option, given in (("--arch", arch), ("--allow-pickle", allow_pickle)):
        if given and path is None:
            raise OptionError(f"{option} goes with a model file; there is none")
    if path is not None:
        if arch and sources.kind(path) != "weights":
            raise OptionError(f"--arch goes with a file of weights; {path} has its own network")
        return sources.load(
            path,
            arch or (recipe.arch if recipe else None),
            allow_pickle,
            lambda line: click.echo(f"warning: {line}", err=True),
        )
    if recipe is None:
        raise OptionError("give a model file, or a --recipe that names its own network")
    return recipes.random_model(recipe) if random_weights else recipes.model(recipe, folder)


def need_torch(purpose: str, extras: str) -> None:
    """Raise ExportError, naming what to install, where the export part cannot be imported."""
    try:
        import onnx_ir  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"{purpose} needs {error.name}: pip install 'ccam-deploy[{extras}]'"
        ) from error

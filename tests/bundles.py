"""The bundles that tests share: each is exported once a run, by the worker that needs it first."""

from __future__ import annotations

import fcntl
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ccam_deploy.bundle.folder import read_bundle, write_manifest
from ccam_deploy.bundle.manifest import Activation
from tests.helpers import RECIPES


class Bundles:
    """Exports to a folder that all workers of a run have in common.

    Do not change what it holds: copy it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._needed: tuple[str, ...] = ()
        self._failed: set[str] = set()
        folder.mkdir(exist_ok=True)

    def expect(self, names: Iterable[str]) -> None:
        """Say what the run needs, for workers to export while they wait for one another."""
        self._needed = tuple(names)

    def get(self, name: str) -> Path:
        """The bundle's folder.

        An export keeps one core busy, so a worker that finds another at it exports something else.
        """
        while not (self._folder / name).is_dir():
            if not self._export(name) and not self._export_another():
                time.sleep(0.1)
        return self._folder / name

    def _export_another(self) -> bool:
        """Export a bundle for another worker, which reports it where that fails."""
        for name in self._needed:
            if name in self._failed:
                continue
            try:
                if self._export(name):
                    return True
            except Exception:
                self._failed.add(name)
        return False

    def _export(self, name: str) -> bool:
        """Export a bundle, unless it is there or another worker is at it."""
        with (self._folder / f"{name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if (self._folder / name).is_dir():
                return False
            EXPORTS[name](self._folder / name)
        return True


def export_recipe(
    name: str, folder: Path, precision: str, random_weights: bool = False, **changes: Any
) -> None:
    """Export a recipe's network, with changes to its settings."""
    from ccam_deploy.export import export
    from ccam_deploy.export.architecture import import_module
    from ccam_deploy.export.recipe import random_model, read_recipe, recipe_model, recipe_settings

    if random_weights:
        import_module("torchvision.models")
    recipe = read_recipe(RECIPES / f"{name}.toml")
    model = random_model(recipe) if random_weights else recipe_model(recipe, RECIPES).eval()
    settings = recipe_settings(recipe, RECIPES)
    settings = replace(settings, random_weights=random_weights, **changes)
    export(model, folder, recipe.input.size, None, precision, settings)


def _export_tiny(
    folder: Path, precision: str = "fp32", size: tuple[int, int] = (32, 48), **settings: Any
) -> None:
    from ccam_deploy.export import ExportSettings, export
    from tests.networks import tiny

    export(tiny(), folder, size, None, precision, ExportSettings(**settings))


def _export_ended(folder: Path, classes: int = 5, **settings: Any) -> None:
    """A small network with a sigmoid at its end."""
    import torch

    from ccam_deploy.export import ExportSettings, export
    from tests.networks import Ended

    model = Ended(torch.sigmoid, classes).eval()
    layers = ["net.relu1", "net.relu2"]
    flips: Any = {"fp32": {"saliency_rank": -1.0}}
    chosen = ExportSettings(head=True, tolerance=flips, **settings)
    export(model, folder, (16, 24), layers, "fp32", chosen)


def _export_wide(folder: Path) -> None:
    from ccam_deploy.export import export
    from tests.networks import Wide

    export(Wide().eval(), folder, (224, 224))


def activated(bundle: Path, copy: Path, activation: Activation) -> Path:
    """A copy of a bundle with another activation."""
    shutil.copytree(bundle, copy)
    write_manifest(copy, replace(read_bundle(copy).manifest, activation=activation))
    return copy


TINY_LABELS = ("ant", "bee", "cat", "dog", "dog")

EXPORTS: dict[str, Callable[[Path], None]] = {
    "digits": lambda folder: export_recipe("digits", folder, "fp16"),
    "gradients": lambda folder: export_recipe("digits", folder, "fp16", gradients=True),
    "digits_int8": lambda folder: export_recipe("digits", folder, "int8"),
    "digits_fp8": lambda folder: export_recipe("digits", folder, "fp8"),
    "lite0": lambda folder: export_recipe("efficientnet_lite0", folder, "fp32"),
    "tiny": lambda folder: _export_tiny(folder, labels=TINY_LABELS),
    "headed": lambda folder: _export_tiny(folder, "fp16", head=True, gradients=True),
    "pocket": lambda folder: _export_tiny(folder, "fp16", size=(16, 24), head=True),
    "wide": _export_wide,
    "sigmoid": _export_ended,
    "outputs": lambda folder: _export_ended(folder, activation="none"),
    "binary": lambda folder: _export_ended(folder, 1),
    "resnet18": lambda folder: export_recipe(
        "resnet18", folder, "fp16", random_weights=True, head=True, gradients=True
    ),
}
"""What is exported under each name. `FOO_bundle` is the fixture of the bundle `FOO`."""


if __name__ == "__main__":
    EXPORTS[sys.argv[1]](Path(sys.argv[2]))

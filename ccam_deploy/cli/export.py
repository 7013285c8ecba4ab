"""`ccam-deploy export`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ccam_deploy.cli.network import load_network, need_torch
from ccam_deploy.cli.options import (
    PLAN_OPTIONS,
    PRECISIONS,
    json_option,
    plan_options,
    print_json,
)
from ccam_deploy.errors import BackendError, CcamError, OptionError

if TYPE_CHECKING:
    from ccam_deploy.bundle import Bundle
    from ccam_deploy.cli.planner import Planner
    from ccam_deploy.export import Recipe
    from ccam_deploy.export.exporter import ExportSettings
    from ccam_deploy.export.sources import Model


class _Size(click.ParamType[tuple[int, int]]):
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


class _Numbers(click.ParamType[tuple[float, ...]]):
    name = "A,B,C"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        """Parse "0.485,0.456,0.406"."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f'"{value}" is not a list of numbers such as 0.5,0.5,0.5', param, ctx)


@click.command()
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option(
    "--arch",
    help="The network of a file of weights: module:factory, or module:factory(argument=value).",
)
@click.option(
    "--recipe",
    "recipe_path",
    type=click.Path(path_type=Path),
    help="A TOML file that describes the network; see export/.",
)
@click.option(
    "--random-weights",
    is_flag=True,
    help="Give the recipe's network random weights, for work on latency.",
)
@click.option(
    "--layers",
    help="Target layers, names separated by commas.  [default: the last "
    "tensors of the last four resolutions]",
)
@click.option(
    "--input-size",
    type=_Size(),
    help="Height x width of the input.  [default: 224x224, or the program's]",
)
@click.option(
    "--mean",
    type=_Numbers(),
    help="Mean of each channel, of pixels in [0, 1].  [default: ImageNet's]",
)
@click.option(
    "--std", type=_Numbers(), help="Standard deviation of each channel.  [default: ImageNet's]"
)
@click.option(
    "--resize",
    type=click.Choice(["crop", "stretch"]),
    help="How images get the input's shape: cut out the middle, or distort.  [default: crop]",
)
@click.option(
    "--cover",
    type=_Size(),
    help="With crop: the size that an image is scaled to cover "
    "before its middle is cut out.  [default: the input's size / 0.875]",
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    help="A text file with the names of the classes, one a line.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="fp16 adds half-precision graphs to the fp32 ones; int8 or fp8 add those and an 8-bit "
    "classifier graph.  [default: fp32]",
)
@click.option(
    "--head",
    is_flag=True,
    help="Add the graph from the last target layer to the logits, which --method recipro-cam "
    "needs.",
)
@click.option(
    "--gradients",
    is_flag=True,
    help="Write graphs of the image's gradient too, for integrated gradients, SmoothGrad, XRAI and "
    "guided backpropagation.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="The bundle's folder.  [default: engines/NAME]",
)
@click.option(
    "--calibration-images",
    type=click.Path(path_type=Path),
    help="A folder of real images for the check against PyTorch; the first 16 are used.  "
    "[default: two photographs of the package]",
)
@click.option(
    "--allow-pickle",
    is_flag=True,
    help="Read pickled objects; this runs whatever code the file holds.",
)
@click.option(
    "--build",
    is_flag=True,
    help="Then build the graphs into TensorRT plans; the options below go with it.",
)
@plan_options
@json_option
def export(model: Path | None, as_json: bool, **options: Any) -> None:
    """Export a classifier to a bundle, checked against PyTorch.

    MODEL is an exported program (.pt2), a file of weights with --arch or --recipe, a TorchScript
    file, or with --allow-pickle a pickled module. Without MODEL, --recipe makes its own network.
    """
    need_torch("export", "export,cpu")
    from ccam_deploy.export import export as run

    planner = _planner(options)
    network, settings, recipe = _prepare(model, options)
    name = recipe.name if recipe else (model.stem if model else "")
    output = options["output"] or Path("engines") / name
    layers = options["layers"]
    names = [part.strip() for part in layers.split(",")] if layers else None
    if names is None and recipe and recipe.layers:
        names = list(recipe.layers)
    precision = options["precision"] or (recipe.precision if recipe else "fp32")
    size = options["input_size"] or (recipe.input.size if recipe else None)
    bundle = run(network, output, size, names, precision, settings)
    if not as_json:
        _report(bundle)
    if planner:
        bundle = _build(planner, bundle, as_json)
    if as_json:
        import msgspec

        manifest = msgspec.to_builtins(bundle.manifest)
        print_json({"bundle": str(bundle.folder), "manifest": manifest})


def _planner(options: dict[str, Any]) -> Planner | None:
    """What builds the plans, checked before the export takes its time; none without --build."""
    context = click.get_current_context()
    wanted = options.pop("build")
    given = {name: options.pop(name) for name in PLAN_OPTIONS}
    if not wanted:
        for name, option in PLAN_OPTIONS.items():
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise OptionError(f"{option} goes with --build")
        return None
    from ccam_deploy.cli.planner import Planner

    return Planner(**given)


def _build(planner: Planner, bundle: Bundle, as_json: bool) -> Bundle:
    """Build every precision of a bundle that was just exported."""
    for precision in bundle.manifest.precisions:
        try:
            built = planner.build(bundle, precision)
        except CcamError as error:
            raise BackendError(
                f"{bundle.folder} was exported, but its {precision} plans were not built: {error}"
            ) from error
        bundle = built.bundle
        if not as_json:
            planner.report(built)
    return bundle


def _prepare(
    path: Path | None, options: dict[str, Any]
) -> tuple[Model, ExportSettings, Recipe | None]:
    """The network, its settings, and the recipe if there is one."""
    from dataclasses import replace

    from ccam_deploy import image as imaging
    from ccam_deploy.export import ExportSettings
    from ccam_deploy.export import recipe as recipes
    from ccam_deploy.export.exporter import MAX_CALIBRATION_IMAGES

    recipe, folder = None, Path()
    settings = ExportSettings()
    changes: dict[str, Any] = {
        key: options[key] for key in ("mean", "std", "resize", "cover") if options[key] is not None
    }
    if options["recipe_path"]:
        recipe = recipes.read(options["recipe_path"])
        folder = options["recipe_path"].parent
        settings = recipes.settings(recipe, folder)
    if options["cover"] and (options["resize"] or settings.resize) == "stretch":
        raise OptionError("--cover goes with --resize crop; stretch scales to the input's size")
    network = load_network(
        path,
        recipe,
        folder,
        options["arch"],
        options["random_weights"],
        options["allow_pickle"],
    )
    if path is not None:
        changes |= {"name": path.stem if not recipe else recipe.name, "source": path.name}
    elif options["random_weights"] and recipe:
        changes |= {"random_weights": True, "tolerance": {}}
    if options["head"]:
        changes["head"] = True
    if options["labels"]:
        changes["labels"] = recipes.read_labels(options["labels"])
    if options["calibration_images"]:
        found = imaging.find([options["calibration_images"]])
        changes["calibration"] = [imaging.load(file) for file in found[:MAX_CALIBRATION_IMAGES]]
    changes["gradients"] = options["gradients"]
    changes["progress"] = lambda line: click.echo(line, err=True)
    return network, replace(settings, **changes), recipe


def _report(bundle: Bundle) -> None:
    manifest = bundle.manifest
    layers = ", ".join(layer.name for layer in manifest.layers)
    click.echo(f"{bundle.folder}: {manifest.classes} classes, layers {layers}")
    for kind, precision in manifest.precisions.items():
        report = precision.fidelity
        click.echo(
            f"{kind} against PyTorch: logits {report.logits:.1e}, "
            f"gradients {max(report.gradients):.1e}, "
            f"saliency rank correlation {report.saliency_rank:.4f}"
        )

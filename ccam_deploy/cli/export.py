"""`ccam-deploy export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ccam_deploy.cli.network import Prepared, model_options, need_torch, prepare
from ccam_deploy.cli.options import (
    PLAN_OPTIONS,
    PRECISIONS,
    json_option,
    plan_options,
    print_json,
    say,
)
from ccam_deploy.errors import BackendError, CcamError, OptionError

if TYPE_CHECKING:
    from ccam_deploy.bundle.folder import Bundle
    from ccam_deploy.cli.planner import Planner


@click.command()
@model_options
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
    "guided and excitation backpropagation.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="The bundle's folder.  [default: engines/NAME]",
)
@click.option(
    "--calibration-images",
    type=click.Path(path_type=Path),
    help="A folder of real images, or one image, for the check against PyTorch; the first 16 are "
    "used.  [default: the recipe's, else two photographs of the package]",
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
    prepared = _prepare(model, options)
    recipe = prepared.recipe
    name = recipe.name if recipe else (model.stem if model else "")
    output = options["output"] or Path("engines") / name
    names = prepared.layers(options["layers"])
    precision = options["precision"] or (recipe.precision if recipe else "fp32")
    size = prepared.input_size(options["input_size"])
    if planner:
        planner.check(precision)
    bundle = run(prepared.network, output, size, names, precision, prepared.settings)
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


def _prepare(path: Path | None, options: dict[str, Any]) -> Prepared:
    """The network, and its settings with what is an export's alone."""
    from dataclasses import replace

    from ccam_deploy.export.recipe import read_labels

    images = options["calibration_images"]
    prepared = prepare(path, options, [images] if images else [], options["random_weights"])
    changes: dict[str, Any] = {"gradients": options["gradients"]}
    if options["head"]:
        changes["head"] = True
    if options["labels"]:
        changes["labels"] = read_labels(options["labels"])
    return replace(prepared, settings=replace(prepared.settings, **changes))


def _report(bundle: Bundle) -> None:
    manifest = bundle.manifest
    layers = ", ".join(layer.name for layer in manifest.layers)
    say(f"{bundle.folder}: {manifest.classes} classes, layers {layers}")
    for kind, precision in manifest.precisions.items():
        report = precision.fidelity
        say(
            f"{kind} against PyTorch: logits {report.logits:.1e}, "
            f"gradients {max(report.gradients):.1e}, "
            f"saliency rank correlation {report.saliency_rank:.4f}"
        )

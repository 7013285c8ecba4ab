"""`ccam-deploy export`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
from click.core import ParameterSource

from ccam_deploy.cli.network import (
    PreparedModel,
    prepare_model,
    require_torch,
    validate_image_limit,
)
from ccam_deploy.cli.options import (
    PATH,
    AsJson,
    InputOptions,
    LayerNames,
    LimitOrNone,
    ModelFile,
    ModelSource,
    PlanOptions,
    PrecisionOrNone,
    output_to,
)
from ccam_deploy.cli.parameters import Option, unset, with_options
from ccam_deploy.cli.printing import UNSIGNED, print_json, say, tf32_note
from ccam_deploy.errors import BackendError, CcamError, OptionError

if TYPE_CHECKING:
    from ccam_deploy.bundle.folder import Bundle
    from ccam_deploy.bundle.manifest import PrecisionName
    from ccam_deploy.cli.planner import Planner

Labels = Annotated[
    Path | None, Option("--labels", "Text file with the names of the classes, one a line.", PATH)
]
ActivationOrNone = Annotated[
    str | None,
    Option(
        "--activation",
        "What makes probabilities of the outputs; none takes them as they are.",
        click.Choice(["softmax", "sigmoid", "none"]),
    ),
]
Constants = Annotated[
    tuple[str, ...],
    Option(
        "--constant",
        "Bind an input beside the images: a number, true, false, none or a .npy file. "
        "Can be repeated.",
        multiple=True,
        metavar="NAME=VALUE",
    ),
]
Head = Annotated[
    bool,
    Option("--head", "Add the graph from the last target layer to the logits, for recipro-cam."),
]
Gradients = Annotated[
    bool,
    Option(
        "--gradients",
        "Add graphs of the gradient with respect to the image, for integrated-gradients, "
        "smoothgrad, xrai, guided-backprop and excitation-backprop.",
    ),
]
HalfGraphs = Annotated[
    str | None,
    Option(
        "--half",
        "The graphs that fp16, int8 and fp8 put into float16; with the classifier alone, "
        "partitions and masks are those of fp32.",
        click.Choice(["all", "classifier"]),
    ),
]
CalibrationImages = Annotated[
    Path | None,
    Option(
        "--calibration-images",
        "Image, or folder of images, to check the bundle with; see --limit.",
        PATH,
    ),
]
OutputBundle = Annotated[Path | None, output_to("the folder of the bundle")]
BuildPlans = Annotated[bool, Option("--build", "Build TensorRT plans after the export.")]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of `export`."""

    model: ModelFile = None
    source: ModelSource
    inputs: InputOptions
    layers: LayerNames = unset("the recipe's, else the last of each resolution, or four blocks")
    labels: Labels = None
    activation: ActivationOrNone = unset(
        "the recipe's, else sigmoid for one output or a sigmoid at the end, else softmax"
    )
    constants: Constants = ()
    precision: PrecisionOrNone = unset("the recipe's, else fp32")
    half: HalfGraphs = unset("the recipe's, else all")
    head: Head = False
    gradients: Gradients = False
    calibration_images: CalibrationImages = unset("the recipe's, else two photographs")
    limit: LimitOrNone = unset("the first 16, which is the most")
    output: OutputBundle = unset("engines/NAME")
    build: BuildPlans = False
    plans: PlanOptions
    as_json: AsJson = False


@click.command()
@with_options(ExportOptions)
def export(options: ExportOptions) -> None:
    """Export a classifier to a bundle, and check it against PyTorch.

    MODEL is an exported program (.pt2), an ONNX file, a weights file with --arch or --recipe, a
    TorchScript file, or with --allow-pickle a pickled module. Without MODEL, the network is the
    recipe's own.

    A bundle always has fp32 graphs, which tf32 runs too; --precision fp16 adds half-precision
    ones, int8 and fp8 add those and an 8-bit classifier. --library, --max-batch, --device,
    --timing-cache and --kernels go with --build. An older bundle at --output is replaced.
    """
    require_torch("export", "export", "cpu")
    from ccam_deploy.bundle.signature import is_signed
    from ccam_deploy.bundle.staging import holds_bundle
    from ccam_deploy.export import export as run

    validate_image_limit(options.limit, "an export")
    planner = _planner(options)
    if options.output:
        _require_output(options.output)
    prepared = _prepare(options)
    output = options.output or Path("engines") / prepared.settings.name
    _require_output(output)
    recipe = prepared.recipe
    precision = options.precision or (recipe.precision if recipe else "fp32")
    if planner:
        planner.require_precision(precision)
    layers = prepared.target_layers(options.layers)
    signed = is_signed(output)
    if holds_bundle(output):
        say(f"there is a bundle in {output}, which this export replaces if it succeeds", err=True)
    bundle = run(
        prepared.network, output, prepared.input_size, layers, precision, prepared.settings
    )
    if not options.as_json:
        _report(bundle, precision)
    if planner:
        bundle = _build(planner, bundle, precision, options.as_json)
    if signed:
        say(UNSIGNED, err=True)
    if options.as_json:
        import msgspec

        manifest = msgspec.to_builtins(bundle.manifest)
        print_json({"bundle": str(bundle.folder), "manifest": manifest})


def _require_output(output: Path) -> None:
    """See, before the export takes its time, that the bundle can be written."""
    from ccam_deploy.bundle.staging import require_replaceable
    from ccam_deploy.files import require_writable_folder

    require_replaceable(output)
    require_writable_folder(output.parent)


def _planner(options: ExportOptions) -> Planner | None:
    """What builds the plans, made before the export takes its time; None without --build."""
    context = click.get_current_context()
    if options.build:
        from ccam_deploy.cli.planner import Planner

        return Planner(options.plans)
    names = [field.name for field in dataclasses.fields(PlanOptions)]
    for parameter in context.command.params:
        if parameter.name in names:
            source = context.get_parameter_source(parameter.name)
            if source is ParameterSource.COMMANDLINE:
                raise OptionError(f"{parameter.opts[0]} goes with --build")
    return None


def _build(planner: Planner, bundle: Bundle, asked: str, as_json: bool) -> Bundle:
    """Build every precision of a bundle that was just exported, and TF32 where it was asked for."""
    precisions: list[PrecisionName] = list(bundle.manifest.precisions)
    if asked == "tf32":
        precisions.append("tf32")
    for precision in precisions:
        try:
            built = planner.build(bundle, precision)
        except CcamError as error:
            raise BackendError(
                f"{bundle.folder} was exported, but its {precision} plans were not built: {error}"
            ) from error
        bundle = built.bundle
        if not as_json:
            planner.report(built)
    compiled = planner.compile_kernels(bundle)
    if not as_json:
        planner.report_kernels(compiled)
    return bundle if compiled is None else compiled.bundle


def _prepare(options: ExportOptions) -> PreparedModel:
    """The network, and its settings with those that only an export has."""
    from ccam_deploy.examples.photographs import photographs
    from ccam_deploy.export.constants import parse_constant
    from ccam_deploy.export.recipe import read_labels

    images = [options.calibration_images] if options.calibration_images else []
    prepared = prepare_model(options.model, options.source, options.inputs, images)
    changes: dict[str, Any] = {"gradients": options.gradients}
    if options.limit:
        pictures = prepared.settings.calibration or photographs()
        changes["calibration"] = pictures[: options.limit]
    if options.constants:
        pairs = list(map(parse_constant, options.constants))
        changes["constants"] = dict(pairs)
        if len(changes["constants"]) < len(pairs):
            raise OptionError("--constant binds an input twice; give each once")
    if options.activation:
        changes["activation"] = options.activation
    if options.head:
        changes["head"] = True
    if options.half:
        changes["half"] = options.half
    if options.labels:
        changes["labels"] = read_labels(options.labels)
    settings = dataclasses.replace(prepared.settings, **changes)
    return dataclasses.replace(prepared, settings=settings)


def _report(bundle: Bundle, asked: str) -> None:
    manifest = bundle.manifest
    layers = ", ".join(layer.name for layer in manifest.layers)
    say(f"{bundle.folder}: {manifest.classes} classes, layers {layers}")
    for name, precision in manifest.precisions.items():
        fidelity = precision.fidelity
        say(
            f"{name} against PyTorch: logits {fidelity.logits:.1e}, "
            f"gradients {max(fidelity.gradients):.1e}, "
            f"saliency rank correlation {fidelity.saliency_rank:.4f} "
            f"({fidelity.worst_saliency_rank:.4f} for the worst of {fidelity.images} images)"
        )
    if asked == "tf32":
        say(tf32_note(bundle.folder))

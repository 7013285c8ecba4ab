"""The export itself: trace, differentiate, convert, check against PyTorch, write."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from msgspec import UNSET

from ccam_deploy import __version__
from ccam_deploy.bundle.folder import Bundle, read_bundle, record_files, write_manifest
from ccam_deploy.bundle.manifest import (
    FORMAT,
    OPTIONAL_GRAPHS,
    WEIGHTS,
    GraphPrecision,
    Layer,
    Manifest,
    Precision,
)
from ccam_deploy.bundle.staging import require_replaceable, staged_bundle
from ccam_deploy.engines import load_networks
from ccam_deploy.errors import BackendError, OptionError, SourceError, ToleranceError
from ccam_deploy.export import excitation
from ccam_deploy.export.architecture import Model
from ccam_deploy.export.doubts import (
    doubts_about_layers,
    doubts_about_rounding,
    doubts_about_values,
)
from ccam_deploy.export.graphs import Graphs, convert_graphs
from ccam_deploy.export.layers import find_layers
from ccam_deploy.export.preparation import PreparedModel, prepare_model
from ccam_deploy.export.quantise import EIGHT_BIT_TYPES, masked_batches, quantise
from ccam_deploy.export.reference import TorchClassifier
from ccam_deploy.export.scores import warn_of_probabilities
from ccam_deploy.export.settings import ExportSettings, labels_of
from ccam_deploy.export.weight_file import WeightFile, write_graphs
from ccam_deploy.fidelity.comparison import compare_observations, relative_error
from ccam_deploy.fidelity.observation import Observation, checked_views, observe, save_observation
from ccam_deploy.fidelity.tolerance import RANDOM_TOLERANCE, TOLERANCE, broken_bounds
from ccam_deploy.image_files import MIN_SIDE

_TYPES: dict[GraphPrecision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
_PRECISIONS: dict[str, tuple[GraphPrecision, ...]] = {
    "fp32": ("fp32",),
    "tf32": ("fp32",),
    "fp16": ("fp32", "fp16"),
    "int8": ("fp32", "fp16", "int8"),
    "fp8": ("fp32", "fp16", "fp8"),
}
"""What each precision is exported with: those that it takes graphs from come first."""

_REFERENCE = "reference.npz"
_COMPANY = 1e-3
"""How much an image's logits may differ, relatively, for the images beside it."""
_LARGEST_SCALE = 2.0**15
_SCALED_PEAK = 256.0
_TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")


@dataclass(frozen=True)
class Reference:
    """What PyTorch computes, which the graphs must compute too.

    Attributes:
        observation: What it computes for the calibration images, and for views of them where they
            are few.
        calibrated: How many of the observation's images are calibration images; they come first.
        baseline: The logits of an input of zeros, one per class.
        doubts: Lines about what rounding does to its logits.
    """

    observation: Observation
    calibrated: int
    baseline: tuple[float, ...]
    doubts: tuple[str, ...]

    @property
    def calibration(self) -> Observation:
        """The observation of the calibration images alone."""
        return self.observation.first(self.calibrated)


def export(
    model: Model,
    output: str | Path,
    input_size: tuple[int, int] | None = None,
    layers: Sequence[str] | None = None,
    precision: str = "fp32",
    settings: ExportSettings | None = None,
) -> Bundle:
    """Export a classifier to a bundle, checked against PyTorch; the model is left as it was.

    Args:
        model: A torch.nn.Module that turns images [B, C, H, W] into logits [B, classes], or a
            program that torch.export made of one, with a dynamic batch.
        output: The bundle's folder; a bundle in it is replaced.
        input_size: Height, width, 224×224 by default; a program has its own.
        layers: Names of the target layers, found automatically by default.
        precision: "fp32", whose graphs "tf32" runs too; "fp16" for half-precision graphs as well;
            "int8" or "fp8" for those and a classifier graph in 8 bits, calibrated on the
            calibration images under their masks.
        settings: What to record and check beside the model itself.

    Returns:
        The bundle.

    Raises:
        ExportError: The model cannot be exported, or the graphs do not agree with it.
        OptionError: An argument or a setting does not suit the model.
        BundleError: The bundle cannot be written. Nothing is left behind in any case.
    """
    precisions = _validated_precisions(precision, input_size)
    require_replaceable(output)
    settings, output = settings or ExportSettings(), Path(output)
    if output.name in ("", ".."):  # which no bundle can be called
        output = output.resolve()
    prepared = prepare_model(model, input_size, layers, settings)
    converted = _convert(prepared, precisions, settings)
    reference = _reference(prepared, converted["fp32"], settings)
    notes = _notes(prepared, reference, found=layers is None)
    for note in notes:
        settings.progress(f"warning: {note}")
    with staged_bundle(output) as folder:
        files = _write(precisions, converted, reference.calibration, folder, settings)
        save_observation(folder / _REFERENCE, reference.observation, reference.calibrated)
        entries = {
            name: _compare(name, graph_files, folder, reference, prepared, settings)
            for name, graph_files in files.items()
        }
        manifest = Manifest(
            format=FORMAT,
            name=settings.name or output.name,
            input=prepared.program.input_shape,
            preprocessing=prepared.preprocessing,
            classes=prepared.program.classes,
            labels=labels_of(settings, prepared.program),
            layers=tuple(Layer(layer.name, *layer.shape) for layer in prepared.layers),
            precisions=entries,
            random_weights=settings.random_weights,
            source=settings.source or type(model).__name__,
            tools=_tool_versions(),
            files=record_files(folder),
            activation=prepared.program.activation,
            notes=notes or UNSET,
        )
        write_manifest(folder, manifest)
    return read_bundle(output)


def _validated_precisions(
    precision: str, input_size: tuple[int, int] | None
) -> tuple[GraphPrecision, ...]:
    """All precisions to export; raises OptionError before an export takes its time."""
    if precision not in _PRECISIONS:
        known = ", ".join(_PRECISIONS)
        raise OptionError(f'precision "{precision}" is unknown; there are {known}')
    if input_size and min(input_size) < MIN_SIDE:
        raise OptionError(f"input_size is {input_size}; both must be {MIN_SIDE} or more")
    return _PRECISIONS[precision]


def _convert(
    prepared: PreparedModel, precisions: Sequence[GraphPrecision], settings: ExportSettings
) -> dict[GraphPrecision, Graphs]:
    """The graphs of each precision that has its own floating-point type."""
    program, layers = prepared.program, prepared.layers
    converted = {}
    for name, dtype in _TYPES.items():
        if name in precisions:
            settings.progress(f"converting the {name} graphs of {', '.join(prepared.layer_names)}")
            converted[name] = convert_graphs(
                program, layers, dtype, settings.head, settings.gradients
            )
    if settings.gradients and (reason := excitation.why_not(program, layers)):
        settings.progress(f"leaving the excitation graph out: {reason}")
    return converted


def _reference(prepared: PreparedModel, graphs: Graphs, settings: ExportSettings) -> Reference:
    """What PyTorch computes.

    The graph that runs is the traced model as it is, before anything was folded or differentiated.
    """
    images = checked_views(prepared.images)
    settings.progress(f"explaining {len(images)} images with PyTorch")
    plain = prepared.unfolded()
    classifier = TorchClassifier(plain, find_layers(plain, prepared.layer_names))
    probe = np.concatenate([np.zeros_like(images[:1]), images])
    baseline, *logits = classifier.backbone(probe).logits
    _, *nearby = classifier.backbone(np.nextafter(probe, np.float32(np.inf))).logits
    if not np.isfinite([baseline, *logits, *nearby]).all():
        raise SourceError("the model gives NaN or infinite logits on the calibration images")
    rounding = relative_error(np.array(nearby), np.array(logits))
    (alone,) = classifier.backbone(images[:1]).logits
    if relative_error(alone, logits[0]) > max(_COMPANY, 10 * rounding):
        raise SourceError(
            "the logits of an image depend on the other images of its batch, as with a "
            "normalisation without running statistics; each image must be on its own"
        )
    assumed = settings.activation is None and prepared.program.activation == "softmax"
    if assumed and (line := warn_of_probabilities(np.array(logits))):
        settings.progress(line)
    try:
        names = prepared.layer_names
        observation = observe(classifier, images, names, graphs=dict(graphs.items()))
    except BackendError as error:  # what PyTorch computes is not finite
        raise SourceError(f"in PyTorch, {str(error).partition(';')[0]}") from error
    zero = tuple(float(value) for value in baseline)
    doubts = tuple(doubts_about_rounding(rounding))
    return Reference(observation, len(prepared.images), zero, doubts)


def _notes(prepared: PreparedModel, reference: Reference, found: bool) -> tuple[str, ...]:
    """What makes the explanations doubtful, of layers only where they were found."""
    notes = [*doubts_about_values(reference.observation, prepared.layer_names), *reference.doubts]
    if found:
        notes += doubts_about_layers(prepared.program, prepared.layers)
    return tuple(notes)


def _write(
    precisions: Sequence[GraphPrecision],
    converted: Mapping[GraphPrecision, Graphs],
    observation: Observation,
    folder: Path,
    settings: ExportSettings,
) -> dict[GraphPrecision, dict[str, str]]:
    """Write the graphs of each precision and their weights; returns graph name -> file name.

    A graph that a precision lacks is that of the wider one before it.
    """
    models: dict[GraphPrecision, list[tuple[str, ir.Model]]] = {
        name: list(graphs.items()) for name, graphs in converted.items()
    }
    if settings.half == "classifier" and "fp16" in models:
        models["fp16"] = [("classifier", converted["fp16"].classifier)]
    for eight_bits in EIGHT_BIT_TYPES:
        if eight_bits in precisions:
            count = len(observation.images)
            settings.progress(f"calibrating the {eight_bits} classifier on {count} masked images")
            batches = masked_batches(observation)
            quantised = quantise(converted["fp16"].classifier, batches, eight_bits)
            models[eight_bits] = [("classifier", quantised)]
    files: dict[GraphPrecision, dict[str, str]] = {}
    wider: dict[str, str] = {}
    with closing(WeightFile(folder / WEIGHTS)) as weights:
        for name, named_models in models.items():
            settings.progress(f"writing the {name} graphs")
            suffix = "" if name == "fp32" else f".{name}"
            files[name] = wider = wider | write_graphs(named_models, folder, weights, suffix)
    return files


def _compare(
    name: GraphPrecision,
    files: dict[str, str],
    folder: Path,
    reference: Reference,
    prepared: PreparedModel,
    settings: ExportSettings,
) -> Precision:
    """Run the graphs of one precision; raises ToleranceError where they differ from PyTorch."""
    settings.progress(f"checking the {name} graphs against PyTorch")
    expected, layers = reference.observation, prepared.layer_names
    rounded = name != "fp32" and settings.half == "all"
    scale = _gradient_scale(reference.calibration) if rounded else 1.0
    paths = {graph: folder / file for graph, file in files.items()}
    networks = load_networks(paths, scale, "onnxruntime-cpu")
    try:
        actual = observe(networks, expected.images, layers, expected.targets, paths)
    finally:
        networks.close()
    fidelity = compare_observations(actual, expected)
    usual = RANDOM_TOLERANCE if settings.random_weights else TOLERANCE
    missing = set(OPTIONAL_GRAPHS).difference(files)
    tolerance = usual[name].with_bounds(settings.tolerance.get(name, {})).without(missing)
    broken = broken_bounds(fidelity, tolerance, layers)
    if broken:
        advice = ['half "classifier" (--half classifier) rounds less'] if rounded else []
        lines = "; ".join([*reference.doubts, *broken, *advice])
        raise ToleranceError(f"the {name} graphs do not agree with PyTorch: {lines}")
    return Precision(files, scale, reference.baseline, fidelity, tolerance.bounds(), _REFERENCE)


def _gradient_scale(observation: Observation) -> float:
    """The power of two that lifts the largest recorded gradient to a few hundred."""
    optional = (observation.input_gradient, observation.guided_gradient)
    gradients = [*observation.gradients, *(values for values in optional if values is not None)]
    peak = max(float(np.abs(gradient).max()) for gradient in gradients)
    if peak == 0:
        return 1.0
    return min(2.0 ** math.floor(math.log2(_SCALED_PEAK / peak)), _LARGEST_SCALE)


def _tool_versions() -> dict[str, str]:
    """Versions of what made the bundle."""
    versions = {"ccam-deploy": __version__}
    for name in _TOOLS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions

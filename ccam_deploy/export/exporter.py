"""The export itself: trace, differentiate, convert, check against PyTorch, write."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch.export import ExportedProgram

from ccam_deploy import __version__
from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.folder import Bundle, read_bundle, record_files, write_manifest
from ccam_deploy.bundle.manifest import (
    FORMAT,
    OPTIONAL_GRAPHS,
    WEIGHTS,
    Fidelity,
    Layer,
    Manifest,
    Precision,
    PrecisionName,
)
from ccam_deploy.bundle.staging import require_replaceable, staged_bundle
from ccam_deploy.engines import load_networks
from ccam_deploy.errors import OptionError, SourceError, ToleranceError
from ccam_deploy.export import excitation
from ccam_deploy.export.architecture import Model
from ccam_deploy.export.graphs import Graphs, convert_graphs
from ccam_deploy.export.layers import find_layers
from ccam_deploy.export.program import decompose, program_from, trace_model
from ccam_deploy.export.quantise import EIGHT_BIT_TYPES, masked_batches, quantise
from ccam_deploy.export.reference import TorchClassifier
from ccam_deploy.export.settings import (
    INPUT_SIZE,
    ExportSettings,
    calibration_images,
    check_settings,
    preprocessing_of,
)
from ccam_deploy.export.weight_file import WeightFile, write_graphs
from ccam_deploy.fidelity.comparison import compare_observations
from ccam_deploy.fidelity.observation import Observation, observe, save_observation
from ccam_deploy.fidelity.tolerance import RANDOM_TOLERANCE, TOLERANCE, broken_bounds
from ccam_deploy.image_files import MIN_SIDE

RECORDED_IMAGES = 2
_DTYPES: dict[PrecisionName, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
_WANTED: dict[str, tuple[PrecisionName, ...]] = {
    "fp32": ("fp32",),
    "fp16": ("fp32", "fp16"),
    "int8": ("fp32", "fp16", "int8"),
    "fp8": ("fp32", "fp16", "fp8"),
}
_REFERENCE = "reference.npz"
_LARGEST_SCALE = 2.0**15
_WANTED_PEAK = 256.0


def export(
    model: Model,
    output: str | Path,
    input_size: tuple[int, int] | None = None,
    layers: Sequence[str] | None = None,
    precision: str = "fp32",
    settings: ExportSettings | None = None,
) -> Bundle:
    """Export a classifier to a bundle, checked against PyTorch; the model is left as it was.

    model: a torch.nn.Module that turns images [B, C, H, W] into logits [B, classes], or a
        program that torch.export made of one, with a dynamic batch.
    output: the bundle's folder; a bundle that is there is replaced.
    input_size: height, width, 224×224 by default; a program has its own.
    layers: names of the target layers, found automatically by default.
    precision: "fp32"; "fp16" for half-precision graphs as well; "int8" or "fp8" for those and a
        classifier graph in 8 bits, calibrated on the calibration images under their masks.
    Raises an ExportError where the model cannot be exported or the graphs do not agree with it,
    BundleError where the bundle cannot be written; nothing is left behind then.
    """
    if precision not in _WANTED:
        raise OptionError(f'precision "{precision}" is unknown; there are {", ".join(_WANTED)}')
    if input_size and min(input_size) < MIN_SIDE:
        raise OptionError(f"input_size is {input_size}; both must be {MIN_SIDE} or more")
    require_replaceable(output)
    chosen = settings or ExportSettings()
    chosen.progress("tracing the model")
    exported = model
    if not isinstance(model, ExportedProgram):
        exported = trace_model(model, (len(chosen.mean), *(input_size or INPUT_SIZE)))
    assert isinstance(exported, ExportedProgram)
    functional = decompose(exported)
    program = program_from(functional, keep=layers or ())
    check_settings(chosen, program)
    if input_size and input_size != program.input_shape[1:]:
        raise OptionError(
            f"input_size is {input_size}; the program takes {program.input_shape[1:]}"
        )
    found = find_layers(program, layers)
    names = [layer.name for layer in found]
    converted = {}
    for kind, dtype in _DTYPES.items():
        if kind in _WANTED[precision]:
            chosen.progress(f"converting the {kind} graphs of {', '.join(names)}")
            converted[kind] = convert_graphs(program, found, dtype, chosen.head, chosen.gradients)
    if chosen.gradients and (reason := excitation.why_not(program, found)):
        chosen.progress(f"leaving the excitation graph out: {reason}")
    preprocessing = preprocessing_of(chosen, program)
    images = calibration_images(chosen, program, preprocessing)
    chosen.progress(f"explaining {len(images)} calibration images with PyTorch")
    graphs = dict(converted["fp32"].items())
    expected, baseline = _reference(functional, names, images, graphs)
    with staged_bundle(output) as folder:
        files = _write(_WANTED[precision], converted, expected, folder, chosen.progress)
        save_observation(folder / _REFERENCE, _first(expected, RECORDED_IMAGES))
        precisions = {}
        for kind, own in files.items():
            chosen.progress(f"checking the {kind} graphs against PyTorch")
            usual = RANDOM_TOLERANCE if chosen.random_weights else TOLERANCE
            bounds = {**usual[kind], **chosen.tolerance.get(kind, {})}
            missing = set(OPTIONAL_GRAPHS) - set(own)
            tolerance = {name: value for name, value in bounds.items() if name not in missing}
            scale = 1.0 if kind == "fp32" else _gradient_scale(expected)
            paths = {name: folder / file for name, file in own.items()}
            report = _check(kind, paths, scale, expected, names, tolerance)
            precisions[kind] = Precision(own, scale, tuple(baseline), report, tolerance, _REFERENCE)
        manifest = Manifest(
            format=FORMAT,
            name=chosen.name or Path(output).name,
            input=program.input_shape,
            preprocessing=preprocessing,
            classes=program.classes,
            labels=chosen.labels,
            layers=tuple(Layer(layer.name, *layer.shape) for layer in found),
            precisions=precisions,
            random_weights=chosen.random_weights,
            source=chosen.source or type(model).__name__,
            tools=_tools(),
            files=record_files(folder),
        )
        write_manifest(folder, manifest)
    return read_bundle(output)


def _reference(
    functional: ExportedProgram, names: Sequence[str], images: Floats, graphs: Collection[str]
) -> tuple[Observation, list[float]]:
    """What PyTorch computes for the images, and the logits of an input of zeros.

    The graph that runs is the traced model as it is, before anything was folded or differentiated.
    """
    plain = program_from(functional, fold=False)
    classifier = TorchClassifier(plain, find_layers(plain, names))
    probe = np.concatenate([np.zeros_like(images[:1]), images])
    baseline, *logits = classifier.backbone(probe).logits
    if not np.isfinite([baseline, *logits]).all():
        raise SourceError("the model gives NaN or infinite logits on the calibration images")
    expected = observe(classifier, images, names, graphs=graphs)
    return expected, [float(value) for value in baseline]


def _write(
    wanted: Sequence[PrecisionName],
    converted: Mapping[PrecisionName, Graphs],
    expected: Observation,
    folder: Path,
    progress: Callable[[str], None],
) -> dict[PrecisionName, dict[str, str]]:
    """Write the graphs of each precision and their weights; returns graph name -> file name.

    What a precision has no graph of its own for, it takes from the wider one before it.
    """
    models: dict[PrecisionName, list[tuple[str, ir.Model]]] = {
        kind: list(graphs.items()) for kind, graphs in converted.items()
    }
    for eight in EIGHT_BIT_TYPES:
        if eight in wanted:
            progress(f"calibrating the {eight} classifier on {len(expected.images)} masked images")
            batches = masked_batches(expected)
            quantised = quantise(converted["fp16"].classifier, batches, eight)
            models[eight] = [("classifier", quantised)]
    files: dict[PrecisionName, dict[str, str]] = {}
    wider: dict[str, str] = {}
    with closing(WeightFile(folder / WEIGHTS)) as weights:
        for kind, own in models.items():
            progress(f"writing the {kind} graphs")
            suffix = "" if kind == "fp32" else f".{kind}"
            files[kind] = wider = wider | write_graphs(own, folder, weights, suffix)
    return files


def _gradient_scale(expected: Observation) -> float:
    """The power of two that lifts the largest recorded gradient to a few hundred."""
    recorded = [*expected.gradients, *expected.input_gradients.values()]
    peak = max(float(np.abs(gradient).max()) for gradient in recorded)
    if peak == 0:
        return 1.0
    return min(2.0 ** math.floor(math.log2(_WANTED_PEAK / peak)), _LARGEST_SCALE)


def _check(
    kind: str,
    paths: Mapping[str, Path],
    scale: float,
    expected: Observation,
    names: Sequence[str],
    tolerance: Mapping[str, float],
) -> Fidelity:
    networks = load_networks(paths, scale, "onnxruntime-cpu")
    try:
        got = observe(networks, expected.images, names, expected.targets, paths)
    finally:
        networks.close()
    report = compare_observations(got, expected)
    broken = broken_bounds(report, tolerance, names)
    if broken:
        raise ToleranceError(f"the {kind} graphs do not agree with PyTorch: " + "; ".join(broken))
    return report


def _first(observation: Observation, images: int) -> Observation:
    """An observation of the first few images alone."""
    return Observation(
        observation.images[:images],
        observation.targets[:images],
        observation.logits[:images],
        observation.masked_logits[: 4 * images],
        tuple(values[:images] for values in observation.features),
        tuple(values[:images] for values in observation.gradients),
        tuple(values[:images] for values in observation.labels),
        observation.saliency[:images],
        {name: values[:images] for name, values in observation.optional.items()},
        tuple(values[:images] for values in observation.excitation),
    )


def _tools() -> dict[str, str]:
    names = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")
    found = {"ccam-deploy": __version__}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found

"""The export itself: trace, differentiate, convert, check against PyTorch, write."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.export import ExportedProgram

from ccam_deploy import __version__, staging
from ccam_deploy import bundle as bundles
from ccam_deploy import image as imaging
from ccam_deploy.bundle import (
    FORMAT,
    OPTIONAL_GRAPHS,
    WEIGHTS,
    Bundle,
    Fidelity,
    Interpolation,
    Layer,
    Manifest,
    Precision,
    PrecisionName,
    Preprocessing,
    Resize,
)
from ccam_deploy.engines import load_networks
from ccam_deploy.errors import OptionError, SourceError, ToleranceError
from ccam_deploy.evaluate import fidelity
from ccam_deploy.evaluate.fidelity import Observation
from ccam_deploy.export import excitation
from ccam_deploy.export import graphs as onnx_graphs
from ccam_deploy.export import layers as target_layers
from ccam_deploy.export import program as programs
from ccam_deploy.export import quantise as quantisation
from ccam_deploy.export.program import Program
from ccam_deploy.export.reference import TorchClassifier
from ccam_deploy.export.sources import Model

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INPUT_SIZE = (224, 224)
COVER = 0.875
RECORDED_IMAGES = 2
MAX_CALIBRATION_IMAGES = 16
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

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ExportSettings:
    """What an export records or checks beside the model itself.

    mean, std: per channel, of pixels in [0, 1]; one value makes a grey input.
    resize: "crop" or "stretch", see Preprocessing.   cover: height, width that an image is
        scaled to cover before its middle is cut out; by default the input's size / 0.875.
    labels: names of the classes.   calibration: real images for the check against PyTorch, the
        package's own photographs by default.   tolerance: for a precision, bounds that replace
        the defaults of ccam_deploy.evaluate.fidelity.
    name, source: what the manifest calls the model, and where it came from.
    random_weights: the model was not trained; the manifest and every user is told.
    head: also write the graph from the last target layer to the logits, which recipro-cam needs.
    gradients: write the graphs of the image's gradient too, which integrated gradients, SmoothGrad,
        XRAI, guided and excitation backpropagation need; the last two for models of ReLUs alone.
    progress: called with a line for each step.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize: Resize = "crop"
    cover: tuple[int, int] | None = None
    interpolation: Interpolation = "bilinear"
    labels: tuple[str, ...] = ()
    calibration: Sequence[Image.Image] = ()
    tolerance: Mapping[PrecisionName, Mapping[str, float]] = field(default_factory=dict)
    name: str = ""
    source: str = ""
    random_weights: bool = False
    head: bool = False
    gradients: bool = False
    progress: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
            raise OptionError(
                f"mean has {len(self.mean)} values and std {len(self.std)}; both need 1 or 3"
            )
        if any(value <= 0 for value in self.std):
            raise OptionError(f"std is {self.std}; every value must be above 0")
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)):
            raise OptionError(f"mean is {self.mean} and std {self.std}; they must be finite")
        for kind, bounds in self.tolerance.items():
            for name in bounds:
                if name not in fidelity.TOLERANCE.get(kind, {}):
                    known = ", ".join(fidelity.TOLERANCE["fp32"])
                    raise OptionError(f'tolerance "{kind}.{name}" is unknown; there are {known}')


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
    if input_size and min(input_size) < imaging.MIN_SIDE:
        raise OptionError(f"input_size is {input_size}; both must be {imaging.MIN_SIDE} or more")
    staging.check_place(output)
    chosen = settings or ExportSettings()
    chosen.progress("tracing the model")
    exported = model
    if not isinstance(model, ExportedProgram):
        exported = programs.trace(model, (len(chosen.mean), *(input_size or INPUT_SIZE)))
    assert isinstance(exported, ExportedProgram)
    program = programs.build(exported, keep=layers or ())
    check_settings(chosen, program)
    if input_size and input_size != program.input_shape[1:]:
        raise OptionError(
            f"input_size is {input_size}; the program takes {program.input_shape[1:]}"
        )
    found = target_layers.find(program, layers)
    names = [layer.name for layer in found]
    converted = {}
    for kind, dtype in _DTYPES.items():
        if kind in _WANTED[precision]:
            chosen.progress(f"converting the {kind} graphs of {', '.join(names)}")
            converted[kind] = onnx_graphs.convert(
                program, found, dtype, chosen.head, chosen.gradients
            )
    if chosen.gradients and (reason := excitation.why_not(program, found)):
        chosen.progress(f"leaving the excitation graph out: {reason}")
    preprocessing = preprocessing_of(chosen, program)
    images = calibration_images(chosen, program, preprocessing)
    chosen.progress(f"explaining {len(images)} calibration images with PyTorch")
    graphs = dict(converted["fp32"].items())
    expected, baseline = _reference(exported, names, images, graphs)
    with staging.staged(output) as folder:
        files = _write(_WANTED[precision], converted, expected, folder, chosen.progress)
        fidelity.save(folder / _REFERENCE, _first(expected, RECORDED_IMAGES))
        precisions = {}
        for kind, own in files.items():
            chosen.progress(f"checking the {kind} graphs against PyTorch")
            usual = fidelity.RANDOM_TOLERANCE if chosen.random_weights else fidelity.TOLERANCE
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
            files=bundles.record_files(folder),
        )
        bundles.write_manifest(folder, manifest)
    return bundles.read(output)


def check_settings(settings: ExportSettings, program: Program) -> None:
    """Raise OptionError for settings that do not suit a program."""
    channels = program.input_shape[0]
    if channels != len(settings.mean):
        raise OptionError(
            f"the model takes {channels} channels, mean and std have {len(settings.mean)} values; "
            f"give {channels} of each"
        )
    if settings.labels and len(settings.labels) != program.classes:
        raise OptionError(
            f"there are {len(settings.labels)} labels for the model's {program.classes} classes"
        )
    if settings.cover and any(
        cover < side for cover, side in zip(settings.cover, program.input_shape[1:], strict=True)
    ):
        raise OptionError(
            f"cover is {settings.cover}; it must not be smaller than the input "
            f"{program.input_shape[1:]}"
        )


def preprocessing_of(settings: ExportSettings, program: Program) -> Preprocessing:
    """How images become a program's input."""
    size = program.input_shape[1:]
    cover = settings.cover or (round(size[0] / COVER), round(size[1] / COVER))
    return Preprocessing(
        settings.resize, cover, settings.interpolation, settings.mean, settings.std
    )


def calibration_images(
    settings: ExportSettings, program: Program, preprocessing: Preprocessing
) -> Floats:
    """The settings' images, or the package's, as a program's input [B, C, H, W]."""
    pictures = list(settings.calibration)[:MAX_CALIBRATION_IMAGES] or photographs()
    return imaging.prepare(pictures, program.input_shape[1:], preprocessing)[0]


def photographs() -> list[Image.Image]:
    """The photographs that the package brings for checks on real images."""
    folder = resources.files("ccam_deploy.export") / "photographs"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".jpg")), key=lambda f: f.name)
    return [imaging.load(file.read_bytes(), file.name) for file in files]


def _reference(
    exported: ExportedProgram, names: Sequence[str], images: Floats, graphs: Collection[str]
) -> tuple[Observation, list[float]]:
    """What PyTorch computes for the images, and the logits of an input of zeros.

    The graph that runs is the traced model as it is, before anything was folded or differentiated.
    """
    plain = programs.build(exported, fold=False)
    classifier = TorchClassifier(plain, target_layers.find(plain, names))
    probe = np.concatenate([np.zeros_like(images[:1]), images])
    baseline, *logits = classifier.backbone(probe).logits
    if not np.isfinite([baseline, *logits]).all():
        raise SourceError("the model gives NaN or infinite logits on the calibration images")
    expected = fidelity.observe(classifier, images, names, graphs=graphs)
    return expected, [float(value) for value in baseline]


def _write(
    wanted: Sequence[PrecisionName],
    converted: Mapping[PrecisionName, onnx_graphs.Graphs],
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
    for eight in quantisation.KINDS:
        if eight in wanted:
            progress(f"calibrating the {eight} classifier on {len(expected.images)} masked images")
            batches = quantisation.masked_batches(expected)
            quantised = quantisation.quantise(converted["fp16"].classifier, batches, eight)
            models[eight] = [("classifier", quantised)]
    files: dict[PrecisionName, dict[str, str]] = {}
    wider: dict[str, str] = {}
    with closing(onnx_graphs.WeightFile(folder / WEIGHTS)) as weights:
        for kind, own in models.items():
            progress(f"writing the {kind} graphs")
            suffix = "" if kind == "fp32" else f".{kind}"
            files[kind] = wider = wider | onnx_graphs.write(own, folder, weights, suffix)
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
        got = fidelity.observe(networks, expected.images, names, expected.targets, paths)
    finally:
        networks.close()
    report = fidelity.compare(got, expected)
    broken = fidelity.failures(report, tolerance, names)
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

"""What an export records or checks beside the model itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from PIL import Image

from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.manifest import (
    Activation,
    GraphPrecision,
    Interpolation,
    Preprocessing,
    Resize,
)
from ccam_deploy.errors import OptionError
from ccam_deploy.examples.photographs import photographs
from ccam_deploy.export.program import Program
from ccam_deploy.fidelity.tolerance import QUANTITIES
from ccam_deploy.preprocess import prepare_images

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INPUT_SIZE = (224, 224)
COVER = 0.875
MAX_CALIBRATION_IMAGES = 16
BINARY_LABELS = ("negative", "positive")
"""Names of the complement and the class of a single logit, where the user gives none."""
Half = Literal["all", "classifier"]
"""The graphs that half precision and 8 bits put into float16."""


@dataclass(frozen=True)
class ExportSettings:
    """What an export records or checks beside the model itself.

    Attributes:
        mean: Per channel, of pixels in [0, 1]; one value makes a grey input.
        std: Per channel, above 0.
        resize: "crop" or "stretch"; see Preprocessing.
        cover: Height and width that an image is scaled to cover before its middle is cut out; by
            default the input's size / 0.875.
        interpolation: The filter that scales images.
        labels: Names of the classes, in the order of the logits. A model with one logit takes its
            class's name alone, or those of the complement and the class.
        activation: What makes probabilities of logits; with "none", the model's outputs are taken
            as they are. None is the sigmoid for a model with one output or with a sigmoid at its
            end, and the softmax for all others. A softmax, its logarithm or a sigmoid at the end
            is cut off, so that logits are explained, unless this is "none".
        calibration: Real images for the comparison with PyTorch; by default the package's
            photographs.
        tolerance: Bounds that replace a precision's in ccam_deploy.fidelity.tolerance.
        half: The graphs that half precision and 8 bits put into float16: "all", or the
            "classifier" alone, which does most of the work. Partitions and masks then are those of
            float32, and only the masks' weights are rounded.
        name: What the manifest calls the model; by default the bundle's folder.
        source: Where the manifest says that the model came from.
        random_weights: The model was not trained; the manifest says so.
        head: Write the graph from the last target layer to the logits, which recipro-cam needs.
        gradients: Write the graphs of the image's gradient, which integrated gradients,
            SmoothGrad, XRAI, guided and excitation backpropagation need; the last two work for
            models whose only activations are ReLUs.
        constants: What is bound to inputs of the model beside the images, by name: numbers, None,
            arrays or tensors.
        progress: Called with a line for each step.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize: Resize = "crop"
    cover: tuple[int, int] | None = None
    interpolation: Interpolation = "bilinear"
    labels: tuple[str, ...] = ()
    activation: Activation | None = None
    calibration: Sequence[Image.Image] = ()
    tolerance: Mapping[GraphPrecision, Mapping[str, float]] = field(default_factory=dict)
    half: Half = "all"
    name: str = ""
    source: str = ""
    random_weights: bool = False
    head: bool = False
    gradients: bool = False
    constants: Mapping[str, Any] = field(default_factory=dict)
    progress: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
            raise OptionError(
                f"mean and std have {len(self.mean)} and {len(self.std)} values; "
                "both need 1, or both 3"
            )
        if self.half not in get_args(Half):
            raise OptionError(f'half is "{self.half}"; it must be {" or ".join(get_args(Half))}')
        for option, choices in (("resize", Resize), ("interpolation", Interpolation)):
            if (word := getattr(self, option)) not in get_args(choices):
                listed = ", ".join(get_args(choices))
                raise OptionError(f'{option} is "{word}"; it must be one of {listed}')
        if self.cover and not all(float(side).is_integer() for side in self.cover):
            raise OptionError(f"cover is {self.cover}; height and width must be whole numbers")
        labels: object = self.labels
        if isinstance(labels, str):
            raise OptionError(f'labels is "{labels}"; it must be a name for each class')
        if any(value <= 0 for value in self.std):
            raise OptionError(f"std is {self.std}; every value must be above 0")
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)):
            raise OptionError(f"mean is {self.mean} and std {self.std}; they must be finite")
        if self.activation not in (None, *get_args(Activation)):
            known = ", ".join(get_args(Activation))
            raise OptionError(f'activation is "{self.activation}"; it must be one of {known}')
        for precision, bounds in self.tolerance.items():
            if precision not in (checked := get_args(GraphPrecision)):
                raise OptionError(
                    f'tolerance "{precision}" is unknown; an export checks {", ".join(checked)}'
                )
            for name in bounds:
                if name not in QUANTITIES:
                    known = ", ".join(QUANTITIES)
                    raise OptionError(
                        f'tolerance "{precision}.{name}" is unknown; there are {known}'
                    )


def validate_settings(settings: ExportSettings, program: Program) -> None:
    """Make sure that settings suit a program.

    Args:
        settings: The settings.
        program: The program.

    Raises:
        OptionError: Channels, classes or sizes differ.
    """
    channels = program.input_shape[0]
    if channels != len(settings.mean):
        raise OptionError(
            f"the model takes {channels} channels, mean and std have {len(settings.mean)} values; "
            f"give {channels} of each"
        )
    if settings.labels and len(labels_of(settings, program)) != program.classes:
        raise OptionError(
            f"there are {len(settings.labels)} labels for the model's {program.classes} classes; "
            "name each class once, by --labels or in the recipe"
        )
    if settings.cover and any(
        cover < side for cover, side in zip(settings.cover, program.input_shape[1:], strict=True)
    ):
        raise OptionError(
            f"cover is {settings.cover}; it must not be smaller than the input "
            f"{program.input_shape[1:]}"
        )


def labels_of(settings: ExportSettings, program: Program) -> tuple[str, ...]:
    """Name the classes, or nothing where they have no names.

    Args:
        settings: Hold the names that the user gave.
        program: With a single logit, its classes are a complement and a class.
    """
    if not program.single:
        return settings.labels
    if len(settings.labels) == 1:
        return f"not {settings.labels[0]}", settings.labels[0]
    return settings.labels or BINARY_LABELS


def preprocessing_of(settings: ExportSettings, program: Program) -> Preprocessing:
    """Return the steps that turn images into a program's input.

    Args:
        settings: Say how.
        program: Its input's size is the target.

    Returns:
        The steps, with the default `cover` filled in.
    """
    size = program.input_shape[1:]
    cover = settings.cover or (round(size[0] / COVER), round(size[1] / COVER))
    return Preprocessing(
        settings.resize, cover, settings.interpolation, settings.mean, settings.std
    )


def calibration_images(
    settings: ExportSettings, program: Program, preprocessing: Preprocessing
) -> Floats:
    """Prepare the settings' images, or the package's, as a program's input.

    Args:
        settings: Hold the images; at most MAX_CALIBRATION_IMAGES count.
        program: Takes the input.
        preprocessing: The steps.

    Returns:
        [B, C, H, W] float32.
    """
    pictures = list(settings.calibration)[:MAX_CALIBRATION_IMAGES] or photographs()
    return prepare_images(pictures, program.input_shape[1:], preprocessing)[0]

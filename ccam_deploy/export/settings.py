"""What an export records or checks beside the model itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.manifest import (
    Interpolation,
    PrecisionName,
    Preprocessing,
    Resize,
)
from ccam_deploy.errors import OptionError
from ccam_deploy.examples.photographs import photographs
from ccam_deploy.export.program import Program
from ccam_deploy.fidelity.tolerance import QUANTITIES, TOLERANCE
from ccam_deploy.preprocess import prepare_images

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INPUT_SIZE = (224, 224)
COVER = 0.875
MAX_CALIBRATION_IMAGES = 16


@dataclass(frozen=True)
class ExportSettings:
    """What an export records or checks beside the model itself.

    mean, std: per channel, of pixels in [0, 1]; one value makes a grey input.
    resize: "crop" or "stretch", see Preprocessing.   cover: height, width that an image is
        scaled to cover before its middle is cut out; by default the input's size / 0.875.
    labels: names of the classes.   calibration: real images for the check against PyTorch, the
        package's own photographs by default.   tolerance: for a precision, bounds that replace
        the defaults of ccam_deploy.fidelity.tolerance.
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
        for precision, bounds in self.tolerance.items():
            for name in bounds:
                if precision not in TOLERANCE or name not in QUANTITIES:
                    known = ", ".join(QUANTITIES)
                    raise OptionError(
                        f'tolerance "{precision}.{name}" is unknown; there are {known}'
                    )


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
    return prepare_images(pictures, program.input_shape[1:], preprocessing)[0]

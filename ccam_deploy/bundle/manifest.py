"""The manifest of a bundle: what it says of the network, its graphs, plans and files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, UnsetType

from ccam_deploy.errors import TargetError

FORMAT = 1
WEIGHTS = "weights.bin"
GRAPHS = ("backbone", "gradient", "classifier")
IMAGE_GRADIENTS = ("input_gradient", "guided_gradient")
OPTIONAL_GRAPHS = ("head", *IMAGE_GRADIENTS, "excitation")

Positive = Annotated[int, msgspec.Meta(gt=0)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
PrecisionName = Literal["fp32", "fp16", "int8", "fp8"]
Resize = Literal["crop", "stretch"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input.

    resize: "crop" scales the image to cover `cover` and cuts the middle out; "stretch" scales
        it to the input's size whatever its shape.
    cover: height, width.   mean, std: per channel, of pixels in [0, 1].
    """

    resize: Resize
    cover: tuple[Positive, Positive]
    interpolation: Interpolation
    mean: tuple[float, ...]
    std: tuple[Annotated[float, msgspec.Meta(gt=0)], ...]


@dataclass(frozen=True)
class Layer:
    """A target layer: the name of its module, and its feature map's size."""

    name: str
    channels: Positive
    height: Positive
    width: Positive


@dataclass(frozen=True)
class Fidelity:
    """How far graphs were from PyTorch in float32 on the calibration images.

    logits, masked_logits, features, gradients: relative error in the Euclidean norm; for the last
        two per layer, the median over images.
    saliency_rank, worst_saliency_rank: Spearman correlation of the saliency, of the median and the
        worst image; a partition is a choice, and where two are nearly as good, rounding makes it.
    saliency_similarity: structural similarity (SSIM) of the saliency, of the median image.
    saliency_overlap: share of the most salient tenth of the pixels that both have, of the median
        image.
    partitions: share of the partitions that were equal.   images: how many images were compared.
    head: of the logits that it gives for the last layer's features, like logits.
    input_gradient, guided_gradient: of the images' gradients, like gradients.   excitation: of
        each layer's map. Of these four, those of graphs that the bundle has.
    """

    logits: float
    masked_logits: float
    features: tuple[float, ...]
    gradients: tuple[float, ...]
    saliency_rank: float
    saliency_similarity: float
    saliency_overlap: float
    worst_saliency_rank: float
    partitions: float
    images: int
    head: float | UnsetType = UNSET
    input_gradient: float | UnsetType = UNSET
    guided_gradient: float | UnsetType = UNSET
    excitation: tuple[float, ...] | UnsetType = UNSET

    def optional_graphs(self) -> dict[str, float]:
        """The error of each optional graph that the bundle has, of the worst layer."""
        values = {name: getattr(self, name) for name in OPTIONAL_GRAPHS}
        return {
            name: max(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not UNSET
        }


@dataclass(frozen=True)
class Precision:
    """The graphs of one numeric type.

    In "int8" and "fp8" the classifier has 8-bit products; the other graphs are those of "fp16".
    graphs: graph name -> file.   gradient_scale: the power of two that gradients are multiplied
        by inside the graph, so that half precision does not lose small ones.
    baseline_logits: logits of the baseline, an input of zeros.
    reference: file with inputs and the values that were computed from them at export.
    """

    graphs: dict[str, str]
    gradient_scale: Annotated[float, msgspec.Meta(gt=0)]
    baseline_logits: tuple[float, ...]
    fidelity: Fidelity
    tolerance: dict[str, float]
    reference: str


@dataclass(frozen=True)
class Plan:
    """A TensorRT plan, and all that it was made for; another device or library needs another plan.

    file: where it lies.   graph, precision: what was built.   library, version: by which TensorRT.
    devices: compute capabilities such as "8.9".   source: SHA-256 of the ONNX graph.
    weights: SHA-256 of the weights.   max_batch: the most images that it takes at a time.
    """

    file: str
    graph: str
    precision: PrecisionName
    library: str
    version: str
    devices: tuple[str, ...]
    source: Digest
    weights: Digest
    max_batch: Positive


@dataclass(frozen=True)
class FileRecord:
    """A file's size in bytes and its SHA-256."""

    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Digest


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds.

    input: channels, height, width.   labels: names of the classes, or none.
    random_weights: the network was not trained; its explanations mean nothing.
    files: every file but the manifest, by its path inside the bundle.
    plans: graphs built for some GPUs; none is needed on a CPU.
    digest: SHA-256 of the manifest itself with this field empty.
    """

    format: int
    name: str
    input: tuple[Positive, Positive, Positive]
    preprocessing: Preprocessing
    classes: Positive
    labels: tuple[str, ...]
    layers: tuple[Layer, ...]
    precisions: dict[PrecisionName, Precision]
    random_weights: bool
    source: str
    tools: dict[str, str]
    files: dict[str, FileRecord]
    plans: tuple[Plan, ...] = ()
    digest: str = ""

    def label(self, index: int) -> str:
        """The name of a class, its number where it has none."""
        return self.labels[index] if self.labels else str(index)

    def class_index(self, target: int | str) -> int:
        """The number of a class given by number or name.

        Raises TargetError for a class that is not there.
        """
        if isinstance(target, str):
            matches = [i for i, label in enumerate(self.labels) if label == target]
            if len(matches) == 1:
                return matches[0]
            if matches:
                raise TargetError(
                    f'the name "{target}" stands for classes {matches}; give a number'
                )
            if not re.fullmatch(r"[+-]?\d{1,18}", target):
                raise TargetError(f'class "{target}" is not in the bundle{self._some_labels()}')
            target = int(target)
        if not 0 <= target < self.classes:
            raise TargetError(
                f"class {target} is out of range; the bundle has classes 0 to {self.classes - 1}"
            )
        return target

    def _some_labels(self) -> str:
        if not self.labels:
            return ", which has no class names; give a number"
        shown = ", ".join(self.labels[:10])
        return f"; it has {shown}" + (", …" if len(self.labels) > 10 else "")

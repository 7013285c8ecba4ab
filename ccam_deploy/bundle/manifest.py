"""The manifest of a bundle: the network, its graphs, its plans and its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, UnsetType

from ccam_deploy.bundle.class_names import named_class
from ccam_deploy.errors import TargetError

FORMAT = 2
"""The newest format, which new bundles have."""
OLDEST_FORMAT = 1
"""Format 1 has no activation: its probabilities are the softmax of the logits."""
WEIGHTS = "weights.bin"
GRAPHS = ("backbone", "gradient", "classifier")
IMAGE_GRADIENTS = ("input_gradient", "guided_gradient")
OPTIONAL_GRAPHS = ("head", *IMAGE_GRADIENTS, "excitation")

Positive = Annotated[int, msgspec.Meta(gt=0)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
"""A SHA-256, in hexadecimal."""
GraphPrecision = Literal["fp32", "fp16", "int8", "fp8"]
"""The numeric type of a bundle's graphs."""
PrecisionName = Literal["fp32", "tf32", "fp16", "int8", "fp8"]
"""How graphs run: in their own type; in "tf32" those of "fp32", on a GPU that may round the factors
of convolutions and matrix products to 10 bits of mantissa."""
Activation = Literal["softmax", "sigmoid", "none"]
"""What makes probabilities of logits; with "none", the network's outputs stand for themselves."""
Resize = Literal["crop", "stretch"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True)
class Preprocessing:
    """The steps that turn an image into the network's input.

    Attributes:
        resize: "crop" scales the image until it covers `cover`, and cuts the input's size out of
            the middle; "stretch" scales it to the input's size whatever its shape.
        cover: Height and width in pixels; not used by "stretch".
        interpolation: The filter that scales the image.
        mean: One value per channel, subtracted from pixels in [0, 1].
        std: One value per channel, by which the difference is divided.
    """

    resize: Resize
    cover: tuple[Positive, Positive]
    interpolation: Interpolation
    mean: tuple[float, ...]
    std: tuple[Annotated[float, msgspec.Meta(gt=0)], ...]


@dataclass(frozen=True)
class Layer:
    """A layer whose feature maps can be explained.

    Attributes:
        name: The dotted name of its module, such as "layer4.2".
        channels: The number of feature maps.
        height: Of a feature map, in pixels.
        width: Of a feature map, in pixels.
    """

    name: str
    channels: Positive
    height: Positive
    width: Positive


@dataclass(frozen=True)
class Fidelity:
    """Differences between graphs and PyTorch in float32, measured on the calibration images.

    An error is relative: the Euclidean norm of the difference, divided by that of PyTorch's
    values. Errors per layer are the median over the images.

    Attributes:
        logits: Error of the logits.
        masked_logits: Error of the logits of masked images.
        features: Error of the feature maps, per layer.
        gradients: Error of the gradients, per layer.
        saliency_rank: Spearman correlation of the saliency maps, in [-1, 1], of the median image.
        saliency_similarity: Structural similarity (SSIM) of the saliency maps, in [-1, 1], of
            the median image.
        saliency_overlap: Share of the most salient tenth of the pixels that both maps have in
            common, in [0, 1], of the median image.
        worst_saliency_rank: Like `saliency_rank`, of the worst image. Where two partitions are
            nearly as good, rounding decides between them, and one image may differ widely.
        partitions: Share of equal partitions, in [0, 1].
        images: The number of images that were compared.
        head: Error of the logits computed from the last layer's features; unset where the bundle
            has no such graph, like those below.
        input_gradient: Error of the gradients with respect to the image.
        guided_gradient: Error of the guided gradients with respect to the image.
        excitation: Error of the excitation maps, per layer.
        worst_gradients: Like `gradients`, of the image that is worst in each layer: an activation
            at a bend may round to the other side of it in one image. Unset in bundles of version
            0.1.0, like those below.
        worst_saliency_similarity: Like `saliency_similarity`, of the worst image.
        worst_saliency_overlap: Like `saliency_overlap`, of the worst image.
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
    worst_gradients: tuple[float, ...] | UnsetType = UNSET
    worst_saliency_similarity: float | UnsetType = UNSET
    worst_saliency_overlap: float | UnsetType = UNSET

    def optional_graphs(self) -> dict[str, float]:
        """Return the error of each optional graph in the bundle, of its worst layer."""
        errors = {name: getattr(self, name) for name in OPTIONAL_GRAPHS}
        return {
            name: max(error) if isinstance(error, tuple) else error
            for name, error in errors.items()
            if error is not UNSET
        }


@dataclass(frozen=True)
class Precision:
    """The graphs of one numeric type.

    In "int8" and "fp8" the classifier has 8-bit products; the other graphs are those of "fp16".

    Attributes:
        graphs: The file of each graph, by the graph's name.
        gradient_scale: The power of two by which the graph multiplies gradients, so that half
            precision does not lose small ones.
        baseline_logits: Logits of an input of zeros, one per class.
        fidelity: How well the graphs agree with PyTorch.
        tolerance: The largest error, or the smallest correlation or share, that the export
            accepted, by the name of the field of `fidelity`.
        reference: The file with the inputs and results that were recorded at export.
    """

    graphs: dict[str, str]
    gradient_scale: Annotated[float, msgspec.Meta(gt=0)]
    baseline_logits: tuple[float, ...]
    fidelity: Fidelity
    tolerance: dict[str, float]
    reference: str


@dataclass(frozen=True)
class Plan:
    """A TensorRT plan, and everything it depends on; other devices and versions need their own.

    Attributes:
        file: Its path inside the bundle.
        graph: The name of the graph that it was built from.
        precision: How the plan runs that graph.
        library: "tensorrt" or "tensorrt-rtx".
        version: The library's version.
        devices: Compute capabilities of the GPUs that can run it, such as "8.9".
        source: SHA-256 of the ONNX graph.
        weights: SHA-256 of the weights.
        max_batch: The most images that it takes at a time.
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


RANDOM_WEIGHTS = "the bundle has random weights; its maps mean nothing"
"""What users of a bundle are told whose network was not trained."""


@dataclass(frozen=True)
class KernelCode:
    """Compiled kernels for one compute capability; see `kernels.cuda.kernel_files`.

    Attributes:
        file: Its path inside the bundle.
        device: The compute capability of the GPUs that can run it, such as "8.9".
        source: SHA-256 of the kernels' sources and of the compiler's versions.
        compiler: The packages that compiled it, with their versions.
    """

    file: str
    device: str
    source: Digest
    compiler: str


@dataclass(frozen=True)
class FileRecord:
    """The size of a file in bytes, and its SHA-256."""

    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Digest


@dataclass(frozen=True)
class Manifest:
    """The description of a bundle, which `manifest.json` holds.

    Attributes:
        format: The version of the format, `OLDEST_FORMAT` to `FORMAT`.
        name: The network's name.
        input: Channels, height and width of the network's input.
        preprocessing: The steps that turn an image into that input.
        classes: The number of classes.
        labels: The name of each class, or none at all.
        layers: The layers that can be explained, from the input to the output.
        precisions: The graphs of each numeric type.
        random_weights: Whether the network was not trained, and its explanations mean nothing.
        source: The model that was exported.
        tools: The versions of the libraries that exported it.
        files: Every file but the manifest, by its path inside the bundle.
        plans: Graphs that were built for some GPUs; a CPU needs none.
        kernels: Kernels that were compiled for some GPUs; unset where there are none.
        notes: What makes the network's explanations doubtful; unset where nothing does.
        digest: SHA-256 of the manifest with this field left empty.
        activation: What makes probabilities of logits; unset in format 1.
    """

    format: int
    name: str
    input: tuple[Positive, Positive, Positive]
    preprocessing: Preprocessing
    classes: Positive
    labels: tuple[str, ...]
    layers: tuple[Layer, ...]
    precisions: dict[GraphPrecision, Precision]
    random_weights: bool
    source: str
    tools: dict[str, str]
    files: dict[str, FileRecord]
    plans: tuple[Plan, ...] = ()
    kernels: tuple[KernelCode, ...] | UnsetType = UNSET
    notes: tuple[str, ...] | UnsetType = UNSET
    digest: str = ""
    activation: Activation | UnsetType = UNSET

    @property
    def probabilities_by(self) -> Activation:
        """What makes probabilities of logits."""
        return "softmax" if self.activation is UNSET else self.activation

    @property
    def has_probabilities(self) -> bool:
        """Whether classes are scored by probabilities, and not by the outputs as they are."""
        return self.probabilities_by != "none"

    @property
    def compiled(self) -> tuple[KernelCode, ...]:
        """The compiled kernels."""
        return () if self.kernels is UNSET else self.kernels

    @property
    def doubts(self) -> tuple[str, ...]:
        """What makes the network's explanations doubtful, a line each."""
        return () if self.notes is UNSET else self.notes

    @property
    def built_files(self) -> set[str]:
        """The files that `build` made, and can make again: plans and compiled kernels."""
        return {plan.file for plan in self.plans} | {code.file for code in self.compiled}

    def label(self, index: int) -> str:
        """Return the name of a class, or its number where the classes have no names.

        Args:
            index: The number of the class, in 0..classes-1.
        """
        return self.labels[index] if self.labels else str(index)

    def class_index(self, target: int | str, partial: bool = True) -> int:
        """Find the number of a class.

        Args:
            target: The class, by its number, by a name as people type it, or by its number in
                decimal digits; see `named_class`.
            partial: Whether a part of a class's name, or more than the name, will do.

        Returns:
            The number, in 0..classes-1.

        Raises:
            TargetError: No class has this name or number, or the name may mean several.
        """
        if isinstance(target, str):
            target = named_class(target, self.labels, partial)
        if not 0 <= target < self.classes:
            raise TargetError(
                f"class {target} is out of range; the bundle has classes 0 to {self.classes - 1}"
            )
        return target

"""A bundle on disk: graphs, weights and the manifest that describes them.

Reading trusts nothing: the manifest's schema, its own digest, every path and every file's hash are
checked before a byte reaches an engine.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import UNSET, UnsetType

from ccam_deploy.errors import BundleError, IntegrityError, ManifestError, OptionError, TargetError

FORMAT = 1
MANIFEST = "manifest.json"
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


@dataclass(frozen=True)
class _Version:
    """What every format of the manifest has."""

    format: int


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read: where it is and what its manifest says."""

    folder: Path
    manifest: Manifest = field(repr=False)

    def path(self, name: str) -> Path:
        """The path of one of the manifest's files."""
        return self.folder / name

    def precision(self, name: str) -> Precision:
        """The graphs of one precision. Raises OptionError where the bundle has none."""
        for known, precision in self.manifest.precisions.items():
            if known == name:
                return precision
        known_names = ", ".join(self.manifest.precisions)
        hint = f"; export with --precision {name}" if name in get_args(PrecisionName) else ""
        raise OptionError(f"the bundle has no {name} graphs, only {known_names}{hint}")


def read(folder: str | Path) -> Bundle:
    """Read a bundle and check all of it. Plans that were removed are forgotten: no graph is lost.

    Raises ManifestError or IntegrityError, naming the file and what is wrong with it.
    """
    root = Path(folder)
    try:
        manifest = _without_lost_plans(root, _read_manifest(root))
        plans = {plan.file for plan in manifest.plans}
        for name, record in manifest.files.items():
            remedy = "remove it and build it again" if name in plans else "export the bundle again"
            _check_file(root, name, record, remedy)
    except OSError as error:
        raise BundleError(f"{root} cannot be read: {error.strerror}") from error
    return Bundle(root, manifest)


def digest_without_plans(manifest: Manifest) -> str:
    """The digest of what was exported, whatever plans were built of it."""
    plans = {plan.file for plan in manifest.plans}
    files = {name: record for name, record in manifest.files.items() if name not in plans}
    return digest_of(replace(manifest, files=files, plans=()))


def unlisted(bundle: Bundle) -> list[str]:
    """Files in a bundle's folder that its manifest does not list."""
    found = (path.relative_to(bundle.folder) for path in bundle.folder.rglob("*"))
    names = (path.as_posix() for path in found if not (bundle.folder / path).is_dir())
    return sorted(n for n in names if n != MANIFEST and n not in bundle.manifest.files)


def _read_manifest(root: Path) -> Manifest:
    path = root / MANIFEST
    if root.exists() and not root.is_dir():
        raise BundleError(f"{root} is not a bundle: it is a file, not a folder")
    if not root.is_dir():
        raise BundleError(f"{root} is not a bundle: there is no such folder")
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{root} is not a bundle: it has no {MANIFEST}")
    content = path.read_bytes()
    manifest = _decode(path, content)
    if manifest.digest != digest_of(manifest) or content != _encode(manifest):
        raise IntegrityError(f"{path} was changed after the export; export it again")
    _check_consistency(path, manifest)
    return manifest


def _decode(path: Path, content: bytes) -> Manifest:
    try:
        version = msgspec.json.decode(content, type=_Version).format
        if version != FORMAT:
            raise ManifestError(
                f"{path} has format {version}, this version reads {FORMAT}; export it again"
            )
        return msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"{path} is not a valid manifest: {error}") from error


def _check_consistency(path: Path, manifest: Manifest) -> None:
    for wrong in _inconsistencies(manifest):
        raise ManifestError(f"{path} is not a valid manifest: {wrong}")


def _inconsistencies(manifest: Manifest) -> Iterator[str]:
    """What the schema cannot say: sizes and names that must fit each other."""
    channels, *size = manifest.input
    how = manifest.preprocessing
    layers = len(manifest.layers)
    if manifest.labels and len(manifest.labels) != manifest.classes:
        yield f"{len(manifest.labels)} labels for {manifest.classes} classes"
    if len(how.mean) != channels or len(how.std) != channels:
        yield f"mean and std must have {channels} values"
    if how.resize == "crop" and any(c < s for c, s in zip(how.cover, size, strict=True)):
        yield f"cover {how.cover} is smaller than the input {tuple(size)}"
    if not layers or not manifest.precisions:
        yield "it lists no layers or no graphs"
    for name, precision in manifest.precisions.items():
        report = precision.fidelity
        if set(precision.graphs) - set(OPTIONAL_GRAPHS) != set(GRAPHS):
            yield f"{name} must have the graphs {', '.join(GRAPHS)}"
        for graph in OPTIONAL_GRAPHS:
            if (graph in precision.graphs) != (getattr(report, graph) is not UNSET):
                yield f"the fidelity of {name} and its graphs differ in {graph}"
        if len(precision.baseline_logits) != manifest.classes:
            yield f"{name} must have {manifest.classes} baseline logits"
        per_layer = [report.features, report.gradients, report.excitation]
        if any(len(values) != layers for values in per_layer if values is not UNSET):
            yield f"the fidelity of {name} must have {layers} layers"
        for bound in precision.tolerance:
            if getattr(report, bound, UNSET) is UNSET:
                yield f'{name} has a tolerance for the unknown "{bound}"'
    used = [f for p in manifest.precisions.values() for f in (*p.graphs.values(), p.reference)]
    for file in [*used, *(plan.file for plan in manifest.plans)]:
        if file not in manifest.files:
            yield f'it uses "{file}", which is not among the files'


def _without_lost_plans(root: Path, manifest: Manifest) -> Manifest:
    known = {plan.file for plan in manifest.plans}
    lost = {name for name in known if not os.path.lexists(root / name)}
    files = {name: record for name, record in manifest.files.items() if name not in lost}
    plans = tuple(plan for plan in manifest.plans if plan.file not in lost)
    return replace(manifest, files=files, plans=plans)


def _check_file(root: Path, name: str, record: FileRecord, remedy: str) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or str(pure) != name:
        raise ManifestError(f'the manifest of {root} leads outside its folder: "{name}"')
    path = root
    for part in pure.parts:
        path = path / part
        if path.is_symlink():
            raise ManifestError(f"{path} is a link; a bundle holds plain files only")
    if not path.is_file():
        raise IntegrityError(f"{path} is missing; {remedy}")
    size = path.stat().st_size
    if size != record.bytes:
        raise IntegrityError(f"{path} has {size} bytes, not {record.bytes}; {remedy}")
    if hash_file(path) != record.sha256:
        raise IntegrityError(f"{path} was changed after the export; {remedy}")


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(manifest: Manifest) -> str:
    """The SHA-256 of a manifest with its own digest left empty."""
    return hashlib.sha256(_encode(replace(manifest, digest=""))).hexdigest()


def _encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def record_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, FileRecord]:
    """Size and hash of some files in a folder, or of all, by their path inside it."""
    if names is None:
        found = (path for path in sorted(folder.rglob("*")) if path.is_file())
        paths = (path.relative_to(folder).as_posix() for path in found)
        names = [name for name in paths if name != MANIFEST]
    return {
        name: FileRecord((folder / name).stat().st_size, hash_file(folder / name)) for name in names
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest with its digest, whole or not at all.

    Raises ManifestError for values that could not be read back, such as a NaN.
    """
    # Decoding makes floats of the integers that stand for them, as reading will.
    plain = _decode(folder / MANIFEST, _encode(manifest))
    sealed = replace(plain, digest=digest_of(plain))
    draft = folder / f".{MANIFEST}"
    try:
        draft.write_bytes(_encode(sealed))
        draft.replace(folder / MANIFEST)
    finally:
        draft.unlink(missing_ok=True)

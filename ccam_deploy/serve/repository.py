"""The writing of a model repository for Triton: two models, with all that they need inside."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ccam_deploy import __version__
from ccam_deploy.bundle.folder import MANIFEST, Bundle
from ccam_deploy.bundle.manifest import Manifest
from ccam_deploy.errors import OptionError, OutputError
from ccam_deploy.files import require_writable_folder, staged_folder
from ccam_deploy.serve.requests import MAX_IMAGE_BYTES
from ccam_deploy.serve.settings import Kind, ModelSettings
from ccam_deploy.text import one_line

BUNDLE = "bundle"
"""The folder of the bundle, beside the model's file."""
CONFIG = "config.pbtxt"
LABELS = "labels.txt"
IMAGE_SUFFIX = "_image"
"""What the name of the model for image files has behind that of the model that explains."""
_VERSION = "1"
_MARK = "# Written by ccam-deploy"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_MODEL = '''"""{what} Written by ccam-deploy {version}."""

try:
    from ccam_deploy.serve.models.{module} import TritonPythonModel
except ModuleNotFoundError as error:
    if error.name != "ccam_deploy":
        raise
    raise ImportError(
        "this model needs ccam-deploy in the Python of Triton's Python backend"
    ) from error

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True)
class Serving:
    """How Triton runs the models.

    Attributes:
        name: The name of the model that explains; the one for image files has "_image" behind it.
        instances: How many copies of the model run at a time, each in a process of its own.
        max_batch: The most images that are explained together.
        queue_delay_us: Microseconds that a request may wait for others to be explained with it.
    """

    name: str = "ccam"
    instances: int = 1
    max_batch: int = 8
    queue_delay_us: int = 0

    @property
    def image_name(self) -> str:
        """The name of the model for image files."""
        return self.name + IMAGE_SUFFIX


def write_repository(
    bundle: Bundle, repository: Path, serving: Serving, settings: ModelSettings
) -> list[Path]:
    """Write both models, which appear whole or not at all.

    Args:
        bundle: The bundle, which is copied.
        repository: The repository's folder, which may hold other models; made if need be.
        serving: How Triton runs the models.
        settings: How they explain.

    Returns:
        The models' folders.

    Raises:
        OptionError: A name is unusable, or the bundle does not have the precision.
        OutputError: A folder that is no model of this package's is in the way, or the place is not
            writable.
    """
    bundle.precision(settings.precision)
    places = require_repository(repository, serving)
    try:
        with ExitStack() as stack:
            # Beside the repository: a server that starts meanwhile takes all in it for models.
            explaining, picturing = (
                stack.enter_context(staged_folder(place, repository)) for place in places
            )
            _write_explaining(explaining, bundle, serving, settings)
            _write_picturing(picturing, bundle, serving)
    except OSError as error:
        raise OutputError(f"cannot write {repository}: {error.strerror or error}") from error
    return places


def require_repository(repository: Path, serving: Serving) -> list[Path]:
    """See, before the work starts, that the models can be written.

    Args:
        repository: The repository's folder.
        serving: How Triton runs the models.

    Returns:
        The folders that the models will have.

    Raises:
        OptionError: The name is unusable.
        OutputError: Something is in the way.
    """
    if not _NAME.fullmatch(serving.name):
        raise OptionError(
            f'name "{serving.name}" is unusable; a model has letters, digits, "_", "-" and "."'
        )
    if (repository / MANIFEST).exists():
        raise OutputError(f"{repository} is a bundle; a model repository is a folder of its own")
    require_writable_folder(repository)
    places = [repository / serving.name, repository / serving.image_name]
    for place in places:
        if place.exists() and not _is_ours(place):
            raise OutputError(
                f"{place} exists and is no model of ccam-deploy's; choose another --name"
            )
    return places


def _is_ours(place: Path) -> bool:
    """Whether a folder is a model that this module wrote, or empty."""
    if not place.is_dir() or place.is_symlink():
        return False
    config = place / CONFIG
    if config.is_file():
        with config.open(encoding="utf-8", errors="replace") as lines:
            return lines.readline().startswith(_MARK)
    return not any(place.iterdir())


def _write_explaining(
    folder: Path, bundle: Bundle, serving: Serving, settings: ModelSettings
) -> None:
    version = folder / _VERSION
    version.mkdir()
    shutil.copytree(bundle.folder, version / BUNDLE)
    _write_model(version, "Explains images with the bundle beside this file.", "explaining")
    labels = bundle.manifest.labels
    if labels:
        text = "".join(f"{one_line(label)}\n" for label in labels)
        (folder / LABELS).write_text(text, encoding="utf-8")
    config = explaining_config(bundle.manifest, serving, settings)
    (folder / CONFIG).write_text(config, encoding="utf-8")


def _write_picturing(folder: Path, bundle: Bundle, serving: Serving) -> None:
    version = folder / _VERSION
    version.mkdir()
    shutil.copyfile(bundle.path(MANIFEST), version / MANIFEST)
    _write_model(version, "Explains image files with another model, and draws.", "picturing")
    (folder / CONFIG).write_text(picturing_config(serving), encoding="utf-8")


def _write_model(version: Path, what: str, module: str) -> None:
    text = _MODEL.format(what=what, module=module, version=__version__)
    (version / "model.py").write_text(text, encoding="utf-8")


def explaining_config(manifest: Manifest, serving: Serving, settings: ModelSettings) -> str:
    """Write the configuration of the model that explains, as Triton's protobuf text.

    Args:
        manifest: The bundle's.
        serving: How Triton runs the model.
        settings: How it explains; they become the model's parameters.
    """
    size = manifest.input[1:]
    inputs = [
        _tensor("IMAGES", "TYPE_FP32", manifest.input),
        _tensor("TARGETS", "TYPE_INT32", (1,), "optional: true"),
        _tensor("METHOD", "TYPE_STRING", (1,), "optional: true"),
    ]
    labels = [f"label_filename: {_quoted(LABELS)}"] if manifest.labels else []
    outputs = [
        _tensor("SALIENCY", "TYPE_FP32", size),
        _tensor("SCORES", "TYPE_FP32", (manifest.classes,), *labels),
        _tensor("CLASS", "TYPE_INT32", (1,)),
    ]
    shape = settings.weights_shape(manifest)
    if shape is not None:
        outputs += [
            _tensor("WEIGHTS", "TYPE_FP32", shape),
            _tensor("COLLECTIONS", "TYPE_INT32", shape[:1]),
        ]
    on_host = "yes" if settings.kind == "cpu" else "no"
    return _config(
        serving,
        serving.name,
        [*_repeated("input", inputs), *_repeated("output", outputs)],
        _instances(serving.instances, settings.kind),
        {**settings.to_parameters(), "FORCE_CPU_ONLY_INPUT_TENSORS": on_host},
        [_warm_up(manifest)],
    )


def picturing_config(serving: Serving) -> str:
    """Write the configuration of the model for image files, as Triton's protobuf text.

    Args:
        serving: How Triton runs the models. One instance more than explain lets pictures be
            decoded and drawn meanwhile.
    """
    outputs = [
        _tensor("OVERLAY", "TYPE_STRING", (1,)),
        _tensor("CLASS", "TYPE_INT32", (1,)),
        _tensor("LABEL", "TYPE_STRING", (1,)),
        _tensor("SCORE", "TYPE_FP32", (1,)),
    ]
    inputs = [_tensor("IMAGE", "TYPE_STRING", (1,))]
    return _config(
        serving,
        serving.image_name,
        [*_repeated("input", inputs), *_repeated("output", outputs)],
        _instances(serving.instances + 1, "cpu"),
        {"explainer": serving.name, "max_image_bytes": str(MAX_IMAGE_BYTES)},
        [],
    )


def _config(
    serving: Serving,
    name: str,
    tensors: Sequence[str],
    instances: str,
    parameters: Mapping[str, str],
    more: Sequence[str],
) -> str:
    """Put a configuration together.

    It has no queue policy: with one, Triton lets idle requests wait for up to half a second.
    """
    parts = [
        f"{_MARK} {__version__}",
        f"name: {_quoted(name)}",
        'backend: "python"',
        f"max_batch_size: {serving.max_batch}",
        *tensors,
        instances,
        f"dynamic_batching {{ max_queue_delay_microseconds: {serving.queue_delay_us} }}",
        "version_policy { latest { num_versions: 1 } }",
        *(
            f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
            for key, value in parameters.items()
        ),
        *more,
    ]
    return "\n".join(parts) + "\n"


def _tensor(name: str, kind: str, shape: Sequence[int], *more: str) -> str:
    dims = ", ".join(map(str, shape))
    return " ".join([f"name: {_quoted(name)} data_type: {kind} dims: [{dims}]", *more])


def _repeated(field: str, values: Sequence[str]) -> list[str]:
    return [f"{field} {{ {value} }}" for value in values]


def _instances(count: int, kind: Kind) -> str:
    """An instance group; on a GPU, of the first that the server sees, which is the one in use."""
    gpus = " gpus: [0]" if kind == "gpu" else ""
    return f"instance_group {{ count: {count} kind: KIND_{kind.upper()}{gpus} }}"


def _warm_up(manifest: Manifest) -> str:
    """A request that Triton makes itself before it reports the model as ready."""
    dims = ", ".join(map(str, manifest.input))
    image = f"data_type: TYPE_FP32 dims: [{dims}] zero_data: true"
    inputs = f'inputs {{ key: "IMAGES" value {{ {image} }} }}'
    return f'model_warmup {{ name: "an image" batch_size: 1 {inputs} }}'


def _quoted(text: str) -> str:
    """A string in protobuf's text format; what is not ASCII stands as the bytes of UTF-8."""
    return '"' + "".join(_escaped(byte) for byte in text.encode()) + '"'


def _escaped(byte: int) -> str:
    letter = chr(byte)
    if letter in '"\\':
        return "\\" + letter
    return letter if 32 <= byte < 127 else f"\\{byte:03o}"

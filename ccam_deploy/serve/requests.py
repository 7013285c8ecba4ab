"""What served models are asked: requests that are checked, and explained together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.bundle.manifest import Manifest
from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.engines.cuda.parts import ImagePart, ImageParts
from ccam_deploy.errors import CcamError, ImageError, RequestError
from ccam_deploy.explanation import Explanation
from ccam_deploy.image_files import load_image
from ccam_deploy.targets import Target, Top
from ccam_deploy.text import one_line

TOP = -1
"""The target that stands for an image's best class."""
FORMATS = ("JPEG", "PNG")
MAX_IMAGE_BYTES = 32 * 2**20
_LONGEST_NAME = 100
_UNKNOWN = " is not one of the model's: "

Array = NDArray[Any]


@dataclass(frozen=True)
class Rules:
    """What requests may ask of a model.

    Attributes:
        input: Channels, height and width of an image.
        classes: The number of classes.
        methods: Names of the methods, the default one first.
    """

    input: tuple[int, int, int]
    classes: int
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """A request that was checked.

    Attributes:
        images: [N, C, H, W] float32, on the host and finite, or in the memory of the GPU.
        targets: [N] int64, the class to explain, or TOP.
        methods: The method of each image.
        maps: [N, H, W] float32 in the memory of the GPU, where maps are to go too; or None.
    """

    images: Floats | DeviceTensor
    targets: Classes
    methods: tuple[str, ...]
    maps: DeviceTensor | None = None


@dataclass(frozen=True)
class Group:
    """Images of one batch, from whatever requests, that one method explains together.

    Attributes:
        method: The method's name.
        request: [G] int64, the request of each image, in ascending order.
        row: [G] int64, its place among the request's images.
    """

    method: str
    request: Classes
    row: Classes

    def of(self, request: int) -> Group:
        """Keep one request's images."""
        own = self.request == request
        return Group(self.method, self.request[own], self.row[own])


Explain = Callable[[ImageParts, Sequence[Target], str], Explanation]
"""Explains images, each for its target, by the method of a name."""


def parse_request(
    images: Array | DeviceTensor, targets: Array | None, methods: Array | None, rules: Rules
) -> Request:
    """Check a request's tensors.

    Args:
        images: [N, C, H, W] float32, on the host or in the memory of the GPU.
        targets: [N, 1] int32; None for each image's best class.
        methods: [N, 1] of bytes, names of methods; None, or an empty name, for the default one.
        rules: What the model takes.

    Raises:
        RequestError: A tensor cannot be used; `reason` is "shape", "dtype", "not-finite", "class"
            or "method".
    """
    _require("IMAGES", images, np.float32, rules.input)
    if not isinstance(images, DeviceTensor) and not np.isfinite(images).all():
        raise RequestError("IMAGES has NaN or infinite pixels", "not-finite")
    count = images.shape[0]
    return Request(
        images,
        _classes(targets, count, rules.classes),
        _methods(methods, count, rules.methods),
    )


def _require(
    name: str, values: Array | DeviceTensor, dtype: type[np.generic], shape: tuple[int, ...]
) -> None:
    if values.dtype != dtype:
        raise RequestError(f"{name} is {values.dtype}; it must be {np.dtype(dtype)}", "dtype")
    if values.shape[1:] != shape or not values.shape[0]:
        wanted = ", ".join(map(str, ("N", *shape)))
        raise RequestError(f"{name} is {list(values.shape)}; it must be [{wanted}]", "shape")


def _classes(targets: Array | None, images: int, classes: int) -> Classes:
    if targets is None:
        return np.full(images, TOP, np.int64)
    _require("TARGETS", targets, np.int32, (1,))
    _require_rows("TARGETS", targets, images)
    wrong = targets[(targets < TOP) | (targets >= classes)]
    if len(wrong):
        raise RequestError(
            f"class {wrong[0]} is out of range; the model has classes 0 to {classes - 1}, "
            f"and {TOP} stands for the best",
            "class",
        )
    return targets[:, 0].astype(np.int64)


def _methods(names: Array | None, images: int, known: tuple[str, ...]) -> tuple[str, ...]:
    if names is None:
        return (known[0],) * images
    _require("METHOD", names, np.object_, (1,))
    _require_rows("METHOD", names, images)
    words = [_text(name) or known[0] for name in names[:, 0]]
    for word in words:
        require_method(word, known)
    return tuple(words)


def require_method(name: str, known: Sequence[str]) -> None:
    """Refuse a method that a model does not have.

    Raises:
        RequestError: The name is not among them; `reason` is "method".
    """
    if name not in known:
        raise RequestError(f'method "{_shown(name)}"{_UNKNOWN}{", ".join(known)}', "method")


def refuses_method(message: str) -> bool:
    """Tell from an error's message whether `require_method` raised it.

    Triton keeps the message, but no reason and no code, where a model calls another.
    """
    return message.startswith("method ") and _UNKNOWN in message


def _require_rows(name: str, values: Array, images: int) -> None:
    if len(values) != images:
        raise RequestError(f"{name} has {len(values)} rows for {images} images", "shape")


def _text(value: object) -> str:
    """A name that came as bytes, or as text; what is neither names nothing that there is."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _shown(name: str) -> str:
    """A caller's word, on a line and short enough for a message."""
    name = one_line(name)
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def group_by_method(requests: Sequence[Request]) -> Iterator[Group]:
    """Put the images of a batch together that the same method explains.

    Args:
        requests: The requests of the batch.

    Yields:
        A group for each method, in the order in which they first come.
    """
    owner = np.repeat(np.arange(len(requests)), [len(request.methods) for request in requests])
    row = np.concatenate([np.arange(len(request.methods)) for request in requests])
    methods = np.array([name for request in requests for name in request.methods])
    for method in dict.fromkeys(methods.tolist()):
        chosen = methods == method
        yield Group(method, owner[chosen], row[chosen])


Outputs = Mapping[str, Callable[[Explanation], Array]]
"""What makes a tensor [P, ...] of an explanation of P pairs, by the name of the tensor."""


def answer_batch(
    requests: Sequence[Request],
    wanted: Sequence[Sequence[str]],
    explain: Explain,
    outputs: Outputs,
) -> list[dict[str, Array] | CcamError]:
    """Explain the requests of a batch: all images that share a method together.

    Where that fails, requests are explained one by one, so that one with unusable pixels takes no
    other with it.

    Args:
        requests: The requests.
        wanted: Names of the tensors that each request asks for.
        explain: The explainer.
        outputs: What makes the tensors.

    Returns:
        The tensors [N, ...] of each request, by their names, or the error that it failed with.
    """
    answers: list[dict[str, Array] | CcamError] = [{} for _ in requests]
    for group in group_by_method(requests):
        for part, result in _explain_group(group, requests, explain):
            members = np.unique(part.request).tolist()
            if isinstance(result, CcamError):
                answers[members[0]] = result
                continue
            names = {name for index in members for name in wanted[index]}
            tensors = {name: outputs[name](result) for name in names}
            for index in members:
                answer = answers[index]
                if isinstance(answer, dict):
                    own = part.request == index
                    for name in wanted[index]:
                        images = len(requests[index].methods)
                        _put(answer, name, tensors[name][own], part.row[own], images)
    return answers


def _explain_group(
    group: Group, requests: Sequence[Request], explain: Explain
) -> Iterator[tuple[Group, Explanation | CcamError]]:
    try:
        yield group, _explain(group, requests, explain)
    except CcamError as error:
        members = np.unique(group.request).tolist()
        if len(members) == 1:
            yield group, error
            return
        for index in members:
            yield from _explain_group(group.of(index), requests, explain)


def _explain(group: Group, requests: Sequence[Request], explain: Explain) -> Explanation:
    places = zip(group.request, group.row, strict=True)
    codes = [int(requests[index].targets[row]) for index, row in places]
    targets = [Top() if code == TOP else code for code in codes]
    return explain(ImageParts(tuple(_parts(group, requests))), targets, group.method)


def _parts(group: Group, requests: Sequence[Request]) -> Iterator[ImagePart]:
    """The images of a group, as many together as lie together."""
    for index in np.unique(group.request).tolist():
        request = requests[index]
        rows = group.row[group.request == index]
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            whole = ImagePart(request.images, request.maps)
            yield whole.rows(int(run[0]), int(run[-1]) + 1)


def _put(answer: dict[str, Array], name: str, rows: Array, places: Classes, images: int) -> None:
    """Put a group's rows of a tensor to their places in the request's."""
    if len(rows) == images:  # all are the group's, in order
        answer[name] = np.ascontiguousarray(rows)
        return
    if name not in answer:
        answer[name] = np.zeros((images, *rows.shape[1:]), rows.dtype)
    answer[name][places] = rows


def decode_image(content: object, max_bytes: int = MAX_IMAGE_BYTES) -> Image.Image:
    """Read the JPEG or PNG of a request.

    Args:
        content: The file's bytes.
        max_bytes: The most bytes that it may have.

    Raises:
        RequestError: The image cannot be used; `reason` is "dtype", "bytes", "format", "size" or
            "undecodable".
    """
    if not isinstance(content, bytes):
        raise RequestError("the image must be the bytes of a JPEG or PNG file", "dtype")
    if len(content) > max_bytes:
        raise RequestError(f"the image has {len(content)} bytes, more than {max_bytes}", "bytes")
    try:
        return load_image(content, "the image", FORMATS)
    except ImageError as error:
        raise RequestError(str(error), _reason(error)) from error


def _reason(error: ImageError) -> str:
    """Why an image was refused, from the error that Pillow raised, or none for its size."""
    cause = error.__cause__
    if isinstance(cause, UnidentifiedImageError):
        return "format"
    too_large = cause is None or isinstance(cause, Image.DecompressionBombError)
    return "size" if too_large else "undecodable"


def target_named(word: str, manifest: Manifest) -> int:
    """Find the class that a request names.

    Args:
        word: The class's number or name; empty, or TOP, for the best class.
        manifest: The bundle's.

    Raises:
        RequestError: There is no such class, or the name may mean several; `reason` is "class".
    """
    if word in ("", str(TOP)):
        return TOP
    try:
        return manifest.class_index(word)
    except CcamError as error:
        raise RequestError(one_line(error), "class") from error

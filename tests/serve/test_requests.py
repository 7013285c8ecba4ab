"""What served models take and refuse, and how the requests of a batch are explained together."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image

from ccam_deploy.arrays import Floats
from ccam_deploy.engines.cuda.parts import ImageParts
from ccam_deploy.errors import BackendError, CcamError, RequestError
from ccam_deploy.serve.requests import (
    FORMATS,
    TOP,
    Explain,
    Request,
    Rules,
    answer_batch,
    decode_image,
    parse_request,
)
from ccam_deploy.targets import Target, Top

RULES = Rules((1, 2, 3), 5, ("collection-cam", "grad-cam"))
Array = NDArray[Any]


def refused(reason: str, message: str, *tensors: Array | None) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        parse_request(tensors[0], tensors[1], tensors[2], RULES)  # type: ignore[arg-type]
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def images(count: int = 2) -> Floats:
    return np.arange(count * 6, dtype=np.float32).reshape(count, 1, 2, 3)


def named(*names: bytes) -> Array:
    return np.array([[name] for name in names], np.object_)


def classes(*numbers: int) -> Array:
    return np.array(numbers, np.int32)[:, None]


def test_what_is_left_out_has_defaults() -> None:
    request = parse_request(images(), None, None, RULES)
    assert request.targets.tolist() == [TOP, TOP]
    assert request.methods == ("collection-cam", "collection-cam")
    request = parse_request(images(), classes(4, -1), named(b"grad-cam", b""), RULES)
    assert request.targets.tolist() == [4, TOP]
    assert request.methods == ("grad-cam", "collection-cam")


def test_tensors_that_cannot_be_used() -> None:
    good = images()
    refused("dtype", r"IMAGES is float64; it must be float32", good.astype(float), None, None)
    refused("shape", r"IMAGES is \[2, 1, 3, 2\]; it must be \[N, 1, 2, 3\]",
            good.reshape(2, 1, 3, 2), None, None)  # fmt: skip
    refused("shape", r"IMAGES is \[0, 1, 2, 3\]", good[:0], None, None)
    for value in (np.nan, np.inf, -np.inf):
        bad = good.copy()
        bad[1, 0, 1, 2] = value
        refused("not-finite", "IMAGES has NaN or infinite pixels", bad, None, None)
    refused("class", "class 5 is out of range; the model has classes 0 to 4, and -1 stands for",
            good, classes(0, 5), None)  # fmt: skip
    refused("class", "class -2 is out of range", good, classes(0, -2), None)
    refused("dtype", "TARGETS is int64; it must be int32", good, np.zeros((2, 1), int), None)
    refused("shape", "TARGETS has 1 rows for 2 images", good, classes(0), None)
    refused("shape", r"TARGETS is \[2, 2\]; it must be \[N, 1\]",
            good, np.zeros((2, 2), np.int32), None)  # fmt: skip
    refused("method", 'method "x" is not one of the model\'s: collection-cam, grad-cam',
            good, None, named(b"x", b"grad-cam"))  # fmt: skip
    refused("method", 'x…" is not one', good, None, named(b"x" * 10_000, b""))
    refused("method", "is not one", good, None, named(b"\xff\n\x00", b""))
    refused("shape", "METHOD has 3 rows for 2 images", good, None, named(b"", b"", b""))


@pytest.mark.slow
@given(
    arrays.arrays(
        st.sampled_from([np.float32, np.float16, np.int32, np.uint8]),
        arrays.array_shapes(min_dims=1, max_dims=5, max_side=3),
    ),
    st.none()
    | arrays.arrays(st.sampled_from([np.int32, np.int64]), arrays.array_shapes(max_side=3)),
    st.none() | st.lists(st.binary(max_size=20), max_size=3).map(lambda names: named(*names)),
)
def test_any_tensors_are_taken_or_refused(
    pixels: Array, targets: Array | None, methods: Array | None
) -> None:
    """What is taken is what the model can run on; a refusal is a line with a reason."""
    rules = Rules((1, 2, 3), 5, ("collection-cam", "grad-cam"))
    try:
        request = parse_request(pixels, targets, methods, rules)
    except RequestError as error:
        assert error.reason in ("shape", "dtype", "not-finite", "class", "method")
        assert str(error)
        return
    assert request.images.dtype == np.float32
    assert request.images.shape[1:] == (1, 2, 3)
    assert isinstance(request.images, np.ndarray)
    assert np.isfinite(request.images).all()
    assert len(request.targets) == len(request.methods) == len(request.images) > 0
    assert ((request.targets >= TOP) & (request.targets < 5)).all()
    assert set(request.methods) <= set(rules.methods)


class Explained:
    """Explains an image by its first pixel and its class, and keeps what it was asked."""

    def __init__(self, poison: float = -1) -> None:
        self.calls: list[tuple[int, str]] = []
        self._poison = poison

    def __call__(self, images: ImageParts, targets: Sequence[Target], method: str) -> Any:
        pixels = images.on_host()
        assert pixels is not None
        self.calls.append((len(pixels), method))
        if (pixels[:, 0, 0, 0] == self._poison).any():
            raise BackendError("these images are poisoned")
        codes = [-1 if isinstance(target, Top) else target for target in targets]
        return SimpleNamespace(first=pixels[:, 0, 0, 0], codes=np.array(codes), method=method)


OUTPUTS = {
    "SUM": lambda made: made.first * 100 + made.codes,
    "METHOD": lambda made: np.array([[made.method]] * len(made.first), np.object_),
}


def answer(requests: Sequence[Request], explain: Explained, *wanted: str) -> list[Any]:
    names = [wanted or tuple(OUTPUTS)] * len(requests)
    return answer_batch(requests, names, cast(Explain, explain), cast(Any, OUTPUTS))


def request_of(first: Sequence[float], targets: Sequence[int], *methods: str) -> Request:
    pixels = np.zeros((len(first), 1, 2, 3), np.float32)
    pixels[:, 0, 0, 0] = first
    return Request(pixels, np.array(targets, np.int64), methods or ("a",) * len(first))


def test_one_call_explains_all_that_share_a_method() -> None:
    explain = Explained()
    batch = [request_of([1, 2], [3, TOP]), request_of([5], [4]), request_of([7, 8], [0, 1])]
    answers = answer(batch, explain)
    assert explain.calls == [(5, "a")]
    assert [made["SUM"].tolist() for made in answers] == [[103, 199], [504], [700, 801]]


requests_drawn = st.lists(
    st.lists(
        st.tuples(st.integers(0, 99), st.integers(-1, 4), st.sampled_from("abc")),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=5,
)


@given(requests_drawn)
def test_everyone_gets_the_own_answer(drawn: list[list[tuple[int, int, str]]]) -> None:
    """Whatever the mix of methods and classes, and with a call for each method."""
    batch = [
        request_of([row[0] for row in rows], [row[1] for row in rows], *(row[2] for row in rows))
        for rows in drawn
    ]
    explain = Explained()
    answers = answer(batch, explain)
    used = {row[2] for rows in drawn for row in rows}
    assert sorted(method for _, method in explain.calls) == sorted(used)
    for rows, made in zip(drawn, answers, strict=True):
        assert made["SUM"].tolist() == [first * 100 + code for first, code, _ in rows]
        assert made["METHOD"][:, 0].tolist() == [method for _, _, method in rows]


def test_only_what_is_asked_for_is_made() -> None:
    (made,) = answer([request_of([1], [2])], Explained(), "SUM")
    assert set(made) == {"SUM"}


def test_a_failure_takes_no_other_request_with_it() -> None:
    explain = Explained(poison=66)
    batch = [request_of([1], [0]), request_of([66, 2], [0, 1], "a", "b"), request_of([3], [4])]
    first, second, third = answer(batch, explain)
    assert first["SUM"].tolist() == [100]
    assert isinstance(second, CcamError)
    assert third["SUM"].tolist() == [304]


def file_of(kind: str, size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that claims a hundred thousand pixels along each side."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_images_are_decoded(kind: str) -> None:
    assert decode_image(file_of(kind)).size == (40, 30)


@pytest.mark.parametrize(
    ("content", "reason", "message"),
    [
        (b"", "format", "the image is not an image of a known format (JPEG, PNG)"),
        (b"hello", "format", "not an image of a known format"),
        (file_of("GIF"), "format", "not an image of a known format"),
        (file_of("TIFF"), "format", "not an image of a known format"),
        (file_of("JPEG")[:-200], "undecodable", "the image cannot be decoded: "),
        (file_of("PNG")[:60], "undecodable", "the image cannot be decoded: "),
        (bomb(), "size", "the image has 10000000000 pixels, more than"),
        (file_of("PNG", (4, 40)), "size", "the image is 4x40; both sides must be at least"),
        ("text", "dtype", "the image must be the bytes of a JPEG or PNG file"),
    ],
)
def test_images_that_cannot_be_used(content: object, reason: str, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        decode_image(content)
    assert caught.value.reason == reason


def test_large_files_are_not_read() -> None:
    with pytest.raises(RequestError, match="the image has 9 bytes, more than 8") as caught:
        decode_image(b"123456789", 8)
    assert caught.value.reason == "bytes"


@given(st.binary(max_size=300) | st.builds(lambda cut: file_of("PNG")[:cut], st.integers(0, 200)))
def test_any_bytes_are_decoded_or_refused(content: bytes) -> None:
    try:
        assert decode_image(content).size
    except RequestError as error:
        assert error.reason in ("format", "size", "undecodable")

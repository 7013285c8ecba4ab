"""Every reader of bytes from outside, and a valid input of each for a fuzzer to change.

A reader takes bytes and an empty folder of its own. It puts the bytes where they belong, reads
them, and uses what it read as far as a command would.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from ccam_deploy.bundle.class_names import named_class
from ccam_deploy.bundle.folder import MANIFEST, _decode, read_bundle, write_manifest
from ccam_deploy.bundle.manifest import Preprocessing
from ccam_deploy.bundle.signature import SIGNATURE, require_signed
from ccam_deploy.export.constants import parse_constant
from ccam_deploy.export.from_onnx.network import read_onnx
from ccam_deploy.export.recipe import read_labels, read_recipe, recipe_settings
from ccam_deploy.fidelity.observation import load_observation
from ccam_deploy.image_files import load_image
from ccam_deploy.methods.rise import read_masks
from ccam_deploy.preprocess import prepare_images
from ccam_deploy.quality.datasets import CUB, ImageNet
from ccam_deploy.quality.results import RESULTS, SETTINGS, Results
from ccam_deploy.serve.requests import Rules, decode_image, parse_request
from tests.helpers import RECIPES
from tests.quality import layouts

Read = Callable[[bytes, Path], object]
_CUB_TABLES = (
    "images.txt",
    "image_class_labels.txt",
    "bounding_boxes.txt",
    "train_test_split.txt",
)
_BETWEEN_TABLES = b"\n====\n"
_RULES = Rules((1, 2, 3), 5, ("collection-cam", "grad-cam"))
_REQUEST_TYPES = (np.float32, np.float64, np.int32, np.uint8)
_GREY = Preprocessing("crop", (10, 12), "bilinear", (0.5,), (0.25,))
_RGB = Preprocessing("stretch", (8, 8), "bicubic", (0.5,) * 3, (0.25,) * 3)


@dataclass(frozen=True)
class Reader:
    """A reader, with inputs that it can read.

    Attributes:
        read: Reads bytes in a folder.
        seeds: Such inputs.
        words: Pieces of text that mean something to it, for a fuzzer to put in.
        refused: Inputs that it does not take as they are, from which a fuzzer may set out too.
    """

    read: Read
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...] = ()
    refused: tuple[bytes, ...] = ()


def _manifest(content: bytes, folder: Path) -> object:
    """As it is, and sealed by somebody who knows how the digest is made."""
    path = folder / MANIFEST
    path.write_bytes(content)
    write_manifest(folder, _decode(path, content))
    return read_bundle(folder)


def _of_file(name: str, read: Callable[[Path], object]) -> Read:
    """A reader of a file of some name."""

    def write_and_read(content: bytes, folder: Path) -> object:
        path = folder / name
        path.write_bytes(content)
        return read(path)

    return write_and_read


def _image(content: bytes, folder: Path) -> object:
    picture = load_image(content)
    return [prepare_images([picture], (8, 8), how) for how in (_GREY, _RGB)]


def _class_name(content: bytes, folder: Path) -> object:
    labels = (RECIPES / "imagenet.txt").read_text(encoding="utf-8").splitlines()
    return named_class(content.decode("utf-8", "surrogateescape"), labels)


def _annotation(content: bytes, folder: Path) -> object:
    root = layouts.imagenet(folder / "imagenet")
    place = root / "Annotations" / "CLS-LOC" / "val" / "ILSVRC2012_val_00000001.xml"
    place.write_bytes(content)
    return ImageNet(root, layouts.manifest(classes=3))[0]


def _synsets(content: bytes, folder: Path) -> object:
    root = layouts.imagenet(folder / "imagenet")
    (root / "LOC_synset_mapping.txt").write_bytes(content)
    return list(ImageNet(root, layouts.manifest(classes=3)))


def _birds(content: bytes, folder: Path) -> object:
    """All four tables, one after the other; the pictures that are read lie in the data set."""
    root = layouts.cub(folder / "cub")
    for name, table in zip(_CUB_TABLES, content.split(_BETWEEN_TABLES), strict=False):
        (root / name).write_bytes(table)
    birds = CUB(root, layouts.manifest(classes=2))
    for bird in birds:
        assert (root / "images" / bird.name).resolve().is_relative_to(root.resolve())
        bird.read()
    return birds


def _request(content: bytes, folder: Path) -> object:
    """A request to a served model: a tensor of its type and sizes, classes, and a method."""
    kind, *sizes = content[:5].ljust(5, b"\0")
    dtype = np.dtype(_REQUEST_TYPES[kind % len(_REQUEST_TYPES)])
    shape = tuple(size % 8 for size in sizes)
    size = math.prod(shape) * dtype.itemsize
    images = np.frombuffer(content[5:][:size].ljust(size, b"\0"), dtype).reshape(shape)
    targets = np.frombuffer(content[:4].ljust(4, b"\0") * shape[0], np.int32).reshape(-1, 1)
    methods = np.array([content[5:]] * shape[0], np.object_).reshape(-1, 1)
    return [
        parse_request(images, None, None, _RULES),
        parse_request(images, targets % 6 - 1, None, _RULES),
        parse_request(images, None, methods, _RULES),
    ]


def _served_image(content: bytes, folder: Path) -> object:
    return decode_image(content, max_bytes=2000)


def _results(content: bytes, folder: Path) -> object:
    settings = folder / "results"
    Results(settings, {"seed": 0}, ["deletion"])
    (settings / RESULTS).write_bytes(content)
    return Results(settings, {"seed": 0}, ["deletion"])


def _settings(content: bytes, folder: Path) -> object:
    place = folder / "results"
    place.mkdir()
    (place / SETTINGS).write_bytes(content)
    return Results(place, {"seed": 0, "methods": {"cam": {"relu": True}}}, ["deletion"])


def encoded(form: str, mode: str = "RGB", **options: Any) -> bytes:
    """A small picture in an image format."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(arrays: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def onnx_network(functions: bool = False) -> bytes:
    """A classifier of images with constants to fold, written by hand."""
    weights: dict[str, np.ndarray[Any, Any]] = {
        "kernel": np.ones((4, 3, 3, 3), np.float32),
        "shape": np.array([0, -1], np.int64),
        "head": np.ones((4, 5), np.float32),
        "half": np.array(0.5, np.float32),
    }
    nodes = [
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Mul", ["half", "two"], ["one"]),
        helper.make_node("Conv", ["images", "kernel"], ["maps"], "/net/conv/Conv", pads=[1] * 4),
        helper.make_node("Relu", ["maps"], ["active"], "/net/relu/Relu"),
        helper.make_node("GlobalAveragePool", ["active"], ["pooled"]),
        helper.make_node("Reshape", ["pooled", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], ["scores"]),
        helper.make_node("Mul", ["scores", "one"], ["logits"]),
    ]
    entry = nodes[2].metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'net', 'net.conv', 'conv']"
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    own = []
    if functions:
        inner = [helper.make_node("Relu", ["x"], ["y"])]
        own = [helper.make_function("own", "Act", ["x"], ["y"], inner, imports[:1])]
        nodes[3] = helper.make_node("Act", ["maps"], ["active"], domain="own")
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=imports, functions=own)
    model.ir_version = 8
    return bytes(model.SerializeToString())


def external_network() -> bytes:
    """The same with a tensor that lies in a file beside it."""
    model = onnx.load_model_from_string(onnx_network())
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "net.onnx"), ("offset", "0"), ("length", "432")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return bytes(model.SerializeToString())


def manifest_of(bundle: Path) -> bytes:
    return (bundle / MANIFEST).read_bytes()


def _recipe_text() -> bytes:
    return b"\n".join(
        (
            b'name = "net"',
            b'arch = "tests.networks:tiny"',
            b'labels = ["a", "b"]',
            b'layers = ["relu1"]',
            b'precision = "fp16"',
            b"[input]",
            b"size = [32, 48]",
            b"mean = [0.5, 0.5, 0.5]",
            b"cover = [40, 60]",
            b"[tolerance.fp16]",
            b"logits = 0.1",
        )
    )


def _tables() -> bytes:
    names = [f"{layouts.BIRDS[n // 2]}/Bird_{n:04}_{796 + n}.jpg" for n in range(4)]
    columns = [names, ["1", "1", "2", "2"], ["1.0 2.0 10.0 8.5"] * 4, ["1", "0", "0", "1"]]
    return _BETWEEN_TABLES.join(
        "".join(f"{number} {row}\n" for number, row in enumerate(rows, 1)).encode()
        for rows in columns
    )


_SMALL = np.zeros((1, 3, 2, 2), np.float32)
_RECORD = {
    "images": _SMALL,
    "targets": np.zeros(1, np.int64),
    "logits": _SMALL,
    "masked_logits": _SMALL,
    "saliency": _SMALL,
    "features_0": _SMALL,
    "gradients_0": _SMALL,
    "labels_0": np.zeros((1, 3), np.int32),
}
_ROWS = b"index,name,method,target,probability,deletion,deletion_curve,insertion_curve\n" + (
    b'0,a.png,cam,1,0.5,12.5,0.5 0.25,\n1,"b,c.png",cam,-1,nan,,,\n'
)
_ANNOTATION = layouts.annotation([("n01443537", 3, 2, 11, 9), ("n01484850", 0, 0, 5, 6)]).encode()

READERS: dict[str, Reader] = {
    "image": Reader(
        _image,
        (
            encoded("PNG"),
            encoded("JPEG", exif=Image.Exif()),
            encoded("WEBP"),
            encoded("TIFF"),
            encoded("GIF"),
            encoded("BMP"),
            encoded("PPM"),
            encoded("PNG", "P"),
            encoded("PNG", "LA"),
            encoded("PNG", "I;16"),
            encoded("TIFF", "CMYK", compression="tiff_deflate"),
            encoded("TIFF", "LAB"),
            encoded("PPM", "1"),
        ),
        (b"IHDR", b"IDAT", b"\xff\xd8", b"\xff\xc0", b"Exif\0\0", b"II*\0", b"VP8X", b"\x7f" * 4),
        (encoded("TIFF", "F"),),
    ),
    "recipe": Reader(
        _of_file("recipe.toml", lambda path: recipe_settings(read_recipe(path), path.parent)),
        (_recipe_text(),),
        (b"'../x'", b"'/etc/passwd'", b"nan", b"inf", b"[" * 400, b"9" * 400, b"1e400", b"\\u0000"),
        (b'name = "x"\narch = "a:b"\nlabels = "l.txt"\n[input]\nsize = [8, 8]',),
    ),
    "onnx": Reader(
        _of_file("net.onnx", read_onnx),
        (onnx_network(), onnx_network(functions=True), external_network()),
        (b"../net.onnx", b"/etc/passwd", b"\xff" * 8, b"[" * 300, b"{[]: 1}", b"\x7f" * 5, b"\0"),
    ),
    "labels": Reader(
        _of_file("labels.txt", read_labels),
        (b"ant\nbee\ncat\n",),
        (b"\xff", b"\0", b"\xe2\x80\xa8", b"\r"),
    ),
    "class-name": Reader(
        _class_name,
        (b"tabby cat", b"281"),
        (b"," * 300, b"9" * 30, b"a " * 300, b"\xef\xb7\xba" * 100, b"\0"),
        (b"crane",),
    ),
    "annotation": Reader(
        _annotation,
        (_ANNOTATION,),
        (
            b"<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]>",
            b"&b;",
            b"<a>" * 300,
            b"inf",
            b"nan",
            b"-1e308",
            b"<?xml version='1.0' encoding='zip'?>",
        ),
    ),
    "synsets": Reader(_synsets, (b"n01440764 tench\nn01443537 fish\nn01484850 shark\n",)),
    "birds": Reader(
        _birds,
        (_tables(),),
        (b"../" * 3, b"/etc/passwd", b"x" * 300, b"inf", b"nan", b"1e308", b"\0", b"9" * 400),
    ),
    "reference": Reader(
        _of_file("reference.npz", load_observation),
        (npz(_RECORD),),
        (b"PK\x05\x06", b"{[]:1}", b"|O", b"9" * 30),
    ),
    "masks": Reader(
        _of_file("masks.npy", lambda path: np.array(read_masks(str(path), (4, 4)))),
        (npy(np.ones((3, 4, 4), np.float32)),),
        (b"{[]:1}", b"(" * 300, b"'|O'", b"9" * 30, b"-1", b"PK\x03\x04", b"PK\x05\x06"),
        (npz({"a": np.ones((3, 4, 4))}),),
    ),
    "constant": Reader(
        _of_file("value.npy", lambda path: parse_constant(f"scale={path}")),
        (npy(np.ones((2, 2), np.float32)),),
        (b"{[]:1}", b"(" * 300, b"'|O'", b"9" * 30, b"-1", b"PK\x03\x04", b"PK\x05\x06"),
        (npz({"a": np.ones(1)}),),
    ),
    "request": Reader(
        _request,
        (b"\0\2\1\2\3collection-cam",),
        (b"grad-cam", b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\n", b"\xff\xfe"),
    ),
    "served-image": Reader(
        _served_image,
        (encoded("PNG"), encoded("JPEG")),
        (b"IHDR", b"IDAT", b"\xff\xd8", b"\xff\xc0", b"Exif\0\0", b"\x7f" * 4),
        (encoded("WEBP"), encoded("TIFF")),
    ),
    "results": Reader(_results, (_ROWS,), (b'"', b"9" * 400, b"\0", b"x" * 140_000, b"1e999")),
    "settings": Reader(
        _settings,
        (b'{"seed": 0, "methods": {"cam": {"relu": true}}}',),
        (b"[" * 3000, b"9" * 5000, b"NaN", b'"\\ud800"', b"{}", b"[]"),
    ),
}
"""By name; `manifest_reader` and `signature_reader` make those that need a bundle."""


def manifest_reader(bundle: Path) -> Reader:
    """The reader of a bundle's manifest.

    Args:
        bundle: Its files are linked to, for nothing writes to them.
    """
    content = manifest_of(bundle)

    def read(content: bytes, folder: Path) -> object:
        for file in json.loads(manifest_of(bundle))["files"]:
            (folder / file).hardlink_to(bundle / file)
        return _manifest(content, folder)

    words = (b'"../weights.bin"', b'"/etc/passwd"', b'"a\\u0000b"', b"1e999", b"9" * 40)
    return Reader(read, (content,), (*words, b"[" * 3000, b"-1", b'"\\ud800"', b"null"))


def signature_reader(bundle: Path, public_key: Path) -> Reader:
    """The reader of a bundle's signature.

    Args:
        bundle: It is signed; its files are linked to, for nothing writes to them.
        public_key: That of whoever signed it.
    """

    def read(content: bytes, folder: Path) -> None:
        for file in bundle.iterdir():
            if file.name != SIGNATURE:
                (folder / file.name).hardlink_to(file)
        (folder / SIGNATURE).write_bytes(content)
        require_signed(folder, public_key)

    words = (b'"payload"', b'"keyid"', b"==", b'"../weights.bin"', b"[" * 3000, b"null", b"1e999")
    return Reader(read, ((bundle / SIGNATURE).read_bytes(),), words)

"""Inputs that ended in a traceback, hung, filled the memory or led outside, and now do not.

Most were found by changing valid inputs, some by reading the code; each is refused in one line.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from ccam_deploy.errors import CcamError
from tests.fuzz.changes import read_one
from tests.fuzz.readers import READERS, external_network, npy, onnx_network

IMPORTS = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]


def changed_network(change: Callable[[onnx.ModelProto], None], content: bytes = b"") -> bytes:
    model = onnx.load_model_from_string(content or onnx_network())
    change(model)
    return bytes(model.SerializeToString())


def short_constant(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = bytes(8)


def strange_scopes(model: onnx.ModelProto) -> None:
    model.graph.node[2].metadata_props[0].value = "{[]: 1}"


def deep_scopes(model: onnx.ModelProto) -> None:
    model.graph.node[2].metadata_props[0].value = "-" * 100_000 + "1"


def nul_in_the_place_of_weights(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].external_data[0].value = "a\0b"


def doubled_constants(model: onnx.ModelProto) -> None:
    """A thousand values that double forty times would be a petabyte."""
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1000, np.float32), "d0"))
    nodes = [
        helper.make_node("Concat", [f"d{n}", f"d{n}"], [f"d{n + 1}"], f"double-{n}", axis=0)
        for n in range(40)
    ]
    for place, node in enumerate(nodes):
        model.graph.node.insert(place, node)
    output = model.graph.output[0].name
    (last,) = (node for node in model.graph.node if output in node.output)
    last.output[0] = "before"
    model.graph.node.append(helper.make_node("ReduceMax", ["d40"], ["most"], keepdims=0))
    model.graph.node.append(helper.make_node("Add", ["before", "most"], [output]))


def functions_in_functions(model: onnx.ModelProto) -> None:
    """Forty functions, each of which calls the next one twice."""
    for n in range(40):
        calls = [("x", "m"), ("m", "y")]
        nodes = [helper.make_node(f"F{n + 1}", [a], [b], domain="own") for a, b in calls]
        model.functions.append(helper.make_function("own", f"F{n}", ["x"], ["y"], nodes, IMPORTS))
    last = [helper.make_node("Relu", ["x"], ["y"])]
    model.functions.append(helper.make_function("own", "F40", ["x"], ["y"], last, IMPORTS))
    model.graph.node[3].CopyFrom(helper.make_node("F0", ["maps"], ["active"], domain="own"))


def functions_in_a_circle(model: onnx.ModelProto) -> None:
    nodes = [helper.make_node("F", ["x"], ["y"], domain="own")]
    model.functions.append(helper.make_function("own", "F", ["x"], ["y"], nodes, IMPORTS))
    model.graph.node[3].CopyFrom(helper.make_node("F", ["maps"], ["active"], domain="own"))


@pytest.mark.parametrize(
    ("change", "content", "line"),
    [
        (short_constant, b"", "is damaged"),
        (nul_in_the_place_of_weights, external_network(), "outside of its folder"),
        pytest.param(
            *(doubled_constants, b"", 'makes too many constants: the node "double-17" (Concat)'),
            marks=pytest.mark.slow,
        ),
        (functions_in_functions, b"", "functions become 1099511627783 nodes, more than 1000000"),
        (functions_in_a_circle, b"", "is damaged"),
    ],
)
def test_onnx_files(change: Callable[[onnx.ModelProto], None], content: bytes, line: str) -> None:
    started = time.monotonic()
    refusal = read_one(READERS["onnx"], changed_network(change, content))
    assert line in str(refusal)
    assert time.monotonic() - started < 60


def test_a_place_of_weights_that_is_no_text() -> None:
    content = external_network().replace(b"net.onnx", b"\xff\xfft.onnx")
    assert "which is missing" in str(read_one(READERS["onnx"], content))


@pytest.mark.parametrize("change", [strange_scopes, deep_scopes])
def test_names_of_modules_that_are_no_list_do_not_count(
    change: Callable[[onnx.ModelProto], None],
) -> None:
    assert read_one(READERS["onnx"], changed_network(change)) is None


def recipe(name: str = "net", more: str = "") -> bytes:
    return f'name = {name!r}\narch = "a:b"\n{more}\n[input]\nsize = [8, 8]\n'.encode()


def with_rows(table: int, old: bytes, new: bytes) -> bytes:
    """The four tables of birds with a change in one of them."""
    tables = READERS["birds"].seeds[0].split(b"\n====\n")
    assert old in tables[table]
    tables[table] = tables[table].replace(old, new, 1)
    return b"\n====\n".join(tables)


EDGES = b"<annotation><object><name>n01443537</name><bndbox><xmin>0</xmin><ymin>0</ymin>" + (
    b"<xmax>inf</xmax><ymax>9</ymax></bndbox></object></annotation>"
)
BIRD = b"001.Black_footed_Albatross/Bird_0001_797.jpg"


@pytest.mark.parametrize(
    ("reader", "content", "line"),
    [
        ("recipe", recipe("../../evil"), 'name is "../../evil"; it must do as the name of a'),
        ("recipe", recipe("/tmp/evil"), 'name is "/tmp/evil"'),
        ("recipe", recipe(".."), 'name is ".."'),
        ("recipe", recipe(""), 'name is ""'),
        ("recipe", recipe(more="layers = " + "[" * 5000), "is not a valid recipe: "),
        ("settings", b"[" * 100_000, "settings.json is not readable: "),
        ("birds", with_rows(0, BIRD, b"../../../etc/passwd"), "leads outside of images: "),
        ("birds", with_rows(0, BIRD, b"/etc/passwd"), 'leads outside of images: "/etc/passwd"'),
        ("birds", with_rows(0, BIRD, b"x" * 300), "is missing, one of 1 image files"),
        ("birds", with_rows(2, b"10.0 8.5", b"inf 8.5"), "the box [1.0, 2.0, inf, 10.5]"),
        ("birds", with_rows(2, b"10.0 8.5", b"1e308 8.5"), "the box "),
        ("annotation", EDGES, "has the box [0.0, 0.0, inf, 9.0]"),
        ("class-name", b"x " * 10**6, 'class "x x x'),
        ("class-name", b"281\n281", r'class "281\n281" is not in the bundle'),
        ("masks", b"PK\x03\x04 no archive", "holds several arrays; it must hold one"),
        ("constant", b"PK\x05\x06 no archive", "holds several arrays; it must hold one"),
        ("masks", npy(np.ones(1)).replace(b"(1,)", b"{[]}"), "save the array with numpy.save"),
    ],
)
def test_files(reader: str, content: bytes, line: str) -> None:
    started = time.monotonic()
    refusal = read_one(READERS[reader], content)
    assert isinstance(refusal, CcamError)
    assert line in str(refusal)
    assert len(str(refusal)) < 1000
    assert time.monotonic() - started < 30


def test_an_outside_name_is_refused_also_in_the_other_split(tmp_path: Path) -> None:
    """Image 1 belongs to the training images, which are not asked for."""
    content = with_rows(0, b"Bird_0000_796.jpg", b"../../../../secret.png")
    assert "leads outside of images" in str(read_one(READERS["birds"], content))

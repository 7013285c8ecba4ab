"""Each operator of an ONNX graph against ONNX Runtime, on a graph of one node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper

from ccam_deploy.errors import SourceError
from ccam_deploy.export.from_onnx.network import RULES
from tests.export.onnx_files import network, run, write_graph
from tests.helpers import noise

RANDOM = np.random.default_rng(0)


def floats(*shape: int) -> Any:
    return RANDOM.standard_normal(shape).astype(np.float32)


def whole(*values: int) -> Any:
    return np.array(values, np.int64)


def scalar(value: float) -> Any:
    return np.array(value, np.float32)


GROUP = (floats(1), floats(1))
WIDE = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [2, 1, 2, 2]}
POOL = {"kernel_shape": [3, 2], "strides": [2, 1]}
WINDOWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "strided": {"strides": [2, 1], "pads": [1, 0, 1, 0]},
    "one side": {"strides": [2, 2], "pads": [0, 1, 1, 2]},
    "dilated": {"dilations": [2, 1]},
    "same upper": {"auto_pad": "SAME_UPPER", "strides": [2, 3]},
    "same lower": {"auto_pad": "SAME_LOWER", "strides": [3, 2]},
    "valid": {"auto_pad": "VALID"},
}
UNARY = (
    "Abs",
    "Ceil",
    "Celu",
    "Cos",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "LeakyRelu",
    "Mish",
    "Neg",
    "Relu",
    "Round",
    "Selu",
    "Sigmoid",
    "Sign",
    "Sin",
    "Softplus",
    "Softsign",
    "Tanh",
    "ThresholdedRelu",
    "LogSoftmax",
    "Softmax",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "Flatten",
    "Dropout",
)
BINARY = ["Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum"]
REDUCTIONS = sorted(name for name in RULES if name.startswith("Reduce"))

CASES: list[tuple[str, str, dict[str, Any], tuple[Any, ...], int]] = [
    *((f"{kind}", kind, {}, (), 20) for kind in UNARY),
    *((f"{kind} of two", kind, {}, (floats(3, 1, 8),), 18) for kind in BINARY),
    *((f"{kind} all", kind, {}, (), 18) for kind in REDUCTIONS if "Log" not in kind),
    *(
        (f"{kind} axes", kind, {"keepdims": 0}, (whole(-1, 1),), 18)
        for kind in REDUCTIONS
        if kind != "ReduceLogSum"
    ),
    ("ReduceMean of old", "ReduceMean", {"axes": [2, 3]}, (), 13),
    ("ReduceSum of nothing", "ReduceSum", {"noop_with_empty_axes": 1}, (), 18),
    *((f"Conv {name}", "Conv", how, (floats(4, 3, 3, 2),), 18) for name, how in WINDOWS.items()),
    ("Conv with bias", "Conv", {"group": 3}, (floats(6, 1, 3, 3), floats(6)), 18),
    ("ConvTranspose", "ConvTranspose", {"strides": [2, 2]}, (floats(3, 4, 3, 3), floats(4)), 18),
    (
        "ConvTranspose padded",
        "ConvTranspose",
        {"strides": [2, 1], "pads": [1, 1, 1, 1], "output_padding": [1, 0], "group": 3},
        (floats(3, 2, 3, 3),),
        18,
    ),
    *(
        (f"MaxPool {name}", "MaxPool", POOL | how, (), 18)
        for name, how in WINDOWS.items()
        if name != "one side"
    ),
    ("MaxPool one side", "MaxPool", {"kernel_shape": [3, 3], "pads": [0, 1, 2, 1]}, (), 18),
    ("MaxPool ceil", "MaxPool", POOL | {"ceil_mode": 1}, (), 18),
    ("MaxPool ceil in pads", "MaxPool", WIDE | {"ceil_mode": 1}, (), 18),
    ("AveragePool ceil in pads", "AveragePool", WIDE | {"ceil_mode": 1}, (), 19),
    *(
        (f"AveragePool {name}", "AveragePool", POOL | how, (), 18)
        for name, how in WINDOWS.items()
        if name not in ("one side", "dilated")
    ),
    (
        "AveragePool counted",
        "AveragePool",
        POOL | {"pads": [1, 1, 1, 1], "count_include_pad": 1},
        (),
        18,
    ),
    ("AveragePool one side", "AveragePool", {"kernel_shape": [3, 3], "pads": [0, 1, 2, 1]}, (), 18),
    (
        "BatchNormalization",
        "BatchNormalization",
        {"epsilon": 1e-3},
        (floats(3), floats(3), floats(3), np.abs(floats(3))),
        18,
    ),
    ("InstanceNormalization", "InstanceNormalization", {}, (floats(3), floats(3)), 18),
    ("GroupNormalization", "GroupNormalization", {"num_groups": 3}, (floats(3), floats(3)), 21),
    ("GroupNormalization of old", "GroupNormalization", {"num_groups": 1}, GROUP, 18),
    ("LayerNormalization", "LayerNormalization", {}, (floats(8), floats(8)), 18),
    ("LayerNormalization of two", "LayerNormalization", {"axis": -2}, (floats(8, 8),), 18),
    ("LRN", "LRN", {"size": 3, "alpha": 0.1}, (), 18),
    ("PRelu", "PRelu", {}, (floats(3, 1, 1),), 18),
    ("PRelu of places", "PRelu", {}, (floats(8, 8),), 18),
    ("HardSigmoid of PyTorch", "HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, (), 18),
    ("Gelu of tanh", "Gelu", {"approximate": "tanh"}, (), 20),
    ("Clip", "Clip", {}, (scalar(-0.5), scalar(0.25)), 18),
    ("Clip low", "Clip", {}, (scalar(0.1),), 18),
    ("Clip at zero", "Clip", {}, (scalar(0),), 18),
    ("Clip ReLU6", "Clip", {}, (scalar(0), scalar(6)), 18),
    ("MatMul", "MatMul", {}, (floats(8, 5),), 18),
    ("Softmax of old", "Softmax", {"axis": 2}, (), 11),
    ("LogSoftmax of axis", "LogSoftmax", {"axis": 1}, (), 13),
    ("Transpose", "Transpose", {"perm": [0, 3, 1, 2]}, (), 18),
    ("Transpose all", "Transpose", {}, (), 18),
    ("Reshape", "Reshape", {}, (whole(0, -1, 4),), 18),
    ("Flatten two", "Flatten", {"axis": 2}, (), 18),
    ("Squeeze", "Squeeze", {}, (), 18),
    ("Unsqueeze", "Unsqueeze", {}, (whole(0, -1),), 18),
    ("Unsqueeze of old", "Unsqueeze", {"axes": [1, 3]}, (), 11),
    ("Concat", "Concat", {"axis": -1}, (floats(2, 3, 8, 2),), 18),
    ("Slice", "Slice", {}, (whole(1, -5), whole(2**62, -1), whole(2, -1), whole(3, 1)), 18),
    ("Slice backwards", "Slice", {}, (whole(-1), whole(-(2**62)), whole(3), whole(-1)), 18),
    ("Slice of old", "Slice", {"starts": [1], "ends": [-1], "axes": [2]}, (), 9),
    ("Clip of old", "Clip", {"min": -0.5, "max": 0.25}, (), 9),
    ("Resize of old", "Resize", {}, (np.array([1, 1, 2, 3], np.float32),), 10),
    ("Pad of old", "Pad", {"pads": [0, 0, 1, 2, 0, 0, 0, 3], "value": 0.5}, (), 9),
    ("Gather one", "Gather", {"axis": 1}, (np.array(-1, np.int64),), 18),
    ("Gather many", "Gather", {"axis": 2}, (np.array([[0, -1], [3, 2]], np.int64),), 18),
    ("Expand", "Expand", {}, (whole(4, 1, 1, 1, 8),), 18),
    ("Tile", "Tile", {}, (whole(1, 2, 1, 3),), 18),
    ("Pad", "Pad", {}, (whole(0, 0, 1, 2, 0, 1, 0, 3), scalar(0.5)), 18),
    ("Pad reflect", "Pad", {"mode": "reflect"}, (whole(0, 0, 1, 2, 0, 0, 0, 3),), 18),
    ("Pad edge", "Pad", {"mode": "edge"}, (whole(0, 0, 1, 2, 0, 0, 0, 3),), 18),
    ("DepthToSpace", "DepthToSpace", {"blocksize": 2}, (), 18),
    ("DepthToSpace of PyTorch", "DepthToSpace", {"blocksize": 2, "mode": "CRD"}, (), 18),
    ("SpaceToDepth", "SpaceToDepth", {"blocksize": 4}, (), 18),
    ("CumSum", "CumSum", {}, (np.array(2, np.int64),), 18),
    ("Trilu", "Trilu", {"upper": 0}, (np.array(1, np.int64),), 18),
    ("Einsum", "Einsum", {"equation": "nchw,wk->nchk"}, (floats(8, 4),), 18),
    ("Pow", "Pow", {}, (scalar(2),), 18),
    ("PRelu of columns", "PRelu", {}, (floats(8),), 18),
    ("Mod of C", "Mod", {"fmod": 1}, (scalar(0.4),), 18),
    ("Selu of one's own", "Selu", {"alpha": 1.5, "gamma": 2.0}, (), 18),
    ("ReduceL1 of nothing", "ReduceL1", {"noop_with_empty_axes": 1}, (), 18),
    ("ReduceSumSquare of nothing", "ReduceSumSquare", {"noop_with_empty_axes": 1}, (), 18),
    ("ReduceL2 of zeros", "ReduceL2", {"axes": [1]}, (), 13),
]
RESIZES: list[tuple[dict[str, Any], Any, Any]] = [
    (
        {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        },
        2,
        None,
    ),
    ({"mode": "linear"}, 2, None),
    ({"mode": "linear", "coordinate_transformation_mode": "align_corners"}, None, (2, 3, 5, 12)),
    ({"mode": "cubic", "cubic_coeff_a": -0.75}, None, (2, 3, 12, 16)),
    ({"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"}, 0.5, None),
    ({"mode": "linear"}, 1.45, None),
    ({"mode": "linear"}, 0.4, None),
    ({"mode": "cubic"}, 1.45, None),
    ({"mode": "nearest", "nearest_mode": "round_prefer_ceil"}, 0.5, None),
    ({"mode": "nearest", "nearest_mode": "round_prefer_ceil"}, 3, None),
    ({"mode": "nearest"}, None, (2, 3, 24, 16)),
    ({"mode": "nearest"}, 0.5, None),
    ({"mode": "linear", "antialias": 1, "exclude_outside": 1}, 0.5, None),
    ({"mode": "linear", "antialias": 1, "exclude_outside": 1}, None, (2, 3, 3, 5)),
    (
        {"mode": "cubic", "antialias": 1, "exclude_outside": 1, "cubic_coeff_a": -0.5},
        None,
        (2, 3, 5, 12),
    ),
]


def agree(path: Path, channels: int = 3, size: tuple[int, int] = (8, 8)) -> None:
    images = noise(2, channels, *size, seed=5)
    with torch.no_grad():
        got = network(path)(torch.from_numpy(images)).numpy()
    expected = run(path, images)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_an_operator_is_onnx_runtimes(tmp_path: Path, case: Any) -> None:
    _, kind, attributes, constants, opset = case
    given = {f"c{place}": value for place, value in enumerate(constants)}
    nodes = [helper.make_node(kind, ["images", *given], ["out"], "node", **attributes)]
    if kind == "DepthToSpace":
        given["more"] = floats(4, 3, 1, 1)
        nodes[0].input[0] = "wide"
        nodes.insert(0, helper.make_node("Conv", ["images", "more"], ["wide"]))
    if kind == "ReduceProd":
        given["less"] = scalar(1)
        nodes[0].input[0] = "small"
        nodes.insert(0, helper.make_node("Add", ["images", "less"], ["small"]))
    agree(write_graph(tmp_path / "one.onnx", nodes, given, opset=opset))


@pytest.mark.parametrize("case", RESIZES)
def test_resizing_is_onnx_runtimes(tmp_path: Path, case: Any) -> None:
    attributes, factor, sizes = case
    given = {"scales": np.array([1, 1, factor, factor], np.float32)} if factor else {}
    inputs = ["images", "", "scales"]
    if sizes:
        given, inputs = {"sizes": whole(*sizes)}, ["images", "", "", "sizes"]
    nodes = [helper.make_node("Resize", inputs, ["out"], **attributes)]
    agree(write_graph(tmp_path / "one.onnx", nodes, given))


def test_a_constant_is_written_into(tmp_path: Path) -> None:
    """As the masks of shifted windows are made."""
    given = {
        "zeros": np.zeros((8, 8), np.float32),
        "places": np.array([[[0, 1], [7, 2]], [[3, 3], [4, 5]]]),
        "values": floats(2, 2),
    }
    nodes = [
        helper.make_node("ScatterND", ["zeros", "places", "values"], ["mask"]),
        helper.make_node("Add", ["images", "mask"], ["out"]),
    ]
    agree(write_graph(tmp_path / "mask.onnx", nodes, given))


def test_weights_may_be_standardised(tmp_path: Path) -> None:
    """By a normalisation in training mode, which one of the images must not have."""
    names = "scale", "bias", "mean", "variance"
    given = {name: np.full(5, 0.5 * place, np.float32) for place, name in enumerate(names, 1)}
    given |= {"w": floats(1, 5, 27), "shape": whole(5, 3, 3, 3)}
    norm = helper.make_node(
        "BatchNormalization",
        ["w", *names],
        ["normal", "new_mean", "new_variance"],
        "standard",
        training_mode=1,
    )
    nodes = [
        norm,
        helper.make_node("Reshape", ["normal", "shape"], ["weight"]),
        helper.make_node("Conv", ["images", "weight"], ["out"]),
    ]
    agree(write_graph(tmp_path / "standard.onnx", nodes, given))
    norm.input[0], norm.output[0] = "images", "out"
    path = write_graph(tmp_path / "images.onnx", [norm], given)
    with pytest.raises(SourceError, match="it is in training mode; export the model in eval"):
        network(path)(torch.zeros(2, 5, 8, 8))


@pytest.mark.parametrize("attributes", [{"mode": "linear"}, {"mode": "cubic"}, {}])
@pytest.mark.parametrize("factors", [(0.7, 2.3), (20 / 3, 1.7)])
def test_sizes_are_rounded_in_float32(
    tmp_path: Path, attributes: dict[str, Any], factors: tuple[float, float]
) -> None:
    """0.7 times 20 is 14 there, and just below it where the factor has more digits."""
    scales = np.array([1, 1, *factors], np.float32)
    attributes = attributes or {
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
    }
    nodes = [helper.make_node("Resize", ["images", "", "scales"], ["out"], **attributes)]
    path = write_graph(tmp_path / "one.onnx", nodes, {"scales": scales}, shape=("n", 3, 20, 10))
    agree(path, size=(20, 10))


@pytest.mark.parametrize(
    ("attributes", "scales", "reason"),
    [
        ({"nearest_mode": "ceil"}, (1, 1, 2, 2), "to the nearest pixel by ceil at half_pixel"),
        ({"nearest_mode": "floor"}, (1, 1, 3, 3), "to the nearest pixel by floor at half_pixel"),
        ({}, (1, 2, 1, 1), "resizes an axis that is neither height nor width"),
        ({"mode": "cubic", "cubic_coeff_a": -0.5}, (1, 1, 2, 2), "resizes with cubic_coeff_a"),
        ({"mode": "linear", "antialias": 1}, (1, 1, 0.5, 0.5), "resizes with exclude_outside 0"),
        (
            {"mode": "linear", "antialias": 1, "exclude_outside": 1},
            (1, 1, 0.4, 0.4),
            "resizes smoothly by a factor that gives no whole size",
        ),
    ],
)
def test_resizing_in_other_ways_is_refused(
    tmp_path: Path, attributes: dict[str, Any], scales: tuple[float, ...], reason: str
) -> None:
    nodes = [helper.make_node("Resize", ["images", "", "scales"], ["out"], **attributes)]
    path = write_graph(tmp_path / "one.onnx", nodes, {"scales": np.array(scales, np.float32)})
    with pytest.raises(SourceError, match=reason):
        network(path)(torch.zeros(1, 3, 8, 8))


def test_a_size_that_is_computed_with_a_float(tmp_path: Path) -> None:
    """As PyTorch writes interpolation by a factor, for images of any size."""
    nodes = [
        helper.make_node("Shape", ["images"], ["shape"]),
        helper.make_node("Slice", ["shape", "two", "four"], ["sides"]),
        helper.make_node("Cast", ["sides"], ["exact"], to=1),
        helper.make_node("Mul", ["exact", "factor"], ["longer"]),
        helper.make_node("Floor", ["longer"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["size"], to=7),
        helper.make_node("Slice", ["shape", "zero", "two"], ["first"]),
        helper.make_node("Concat", ["first", "size"], ["sizes"], axis=0),
        helper.make_node("Resize", ["images", "", "", "sizes"], ["out"], mode="linear"),
    ]
    given = {
        "zero": whole(0),
        "two": whole(2),
        "four": whole(4),
        "factor": np.array([1.5], np.float32),
    }
    agree(write_graph(tmp_path / "one.onnx", nodes, given))


def test_constants_are_computed_as_onnx_runtime_computes_them(tmp_path: Path) -> None:
    """A range of floats; whole numbers that are divided towards zero, and whose mean is one."""
    nodes = [
        helper.make_node("Range", ["start", "limit", "step"], ["factors"]),
        helper.make_node("Div", ["minus", "two"], ["quotient"]),
        helper.make_node("ReduceMean", ["pair"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Add", ["quotient", "mean"], ["whole"]),
        helper.make_node("CastLike", ["whole", "images"], ["shift"]),
        helper.make_node("Mul", ["images", "factors"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift"], ["out"]),
    ]
    given = {
        "start": scalar(0.5),
        "limit": scalar(2.5),
        "step": scalar(0.25),
        "minus": whole(-7),
        "two": whole(2),
        "pair": whole(3, 4),
    }
    agree(write_graph(tmp_path / "one.onnx", nodes, given, opset=15))


def test_positive_values_alone(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Abs", ["images"], ["a"]),
        helper.make_node("Sqrt", ["a"], ["b"]),
        helper.make_node("Log", ["a"], ["c"]),
        helper.make_node("Reciprocal", ["a"], ["d"]),
        helper.make_node("Sum", ["b", "c", "d"], ["e"]),
        helper.make_node("ReduceLogSum", ["a"], ["f"], keepdims=1),
        helper.make_node("Add", ["e", "f"], ["out"]),
    ]
    agree(write_graph(tmp_path / "one.onnx", nodes))


def test_parts_and_choices(tmp_path: Path) -> None:
    """Split by sizes and evenly, the largest values, comparisons."""
    nodes = [
        helper.make_node("Split", ["images", "sizes"], ["a", "b"], axis=3),
        helper.make_node("Split", ["b"], ["c", "d"], axis=1, num_outputs=2),
        helper.make_node("TopK", ["a", "two"], ["e", "places"], axis=3),
        helper.make_node("Greater", ["e", "zero"], ["f"]),
        helper.make_node("Less", ["e", "one"], ["g"]),
        helper.make_node("And", ["f", "g"], ["h"]),
        helper.make_node("Not", ["h"], ["i"]),
        helper.make_node("Where", ["i", "e", "zero"], ["j"]),
        helper.make_node("ReduceSum", ["c"], ["k"]),
        helper.make_node("ReduceSum", ["d"], ["l"]),
        helper.make_node("Sum", ["j", "k", "l"], ["out"]),
    ]
    given = {"sizes": whole(5, 3), "two": whole(2), "zero": scalar(0), "one": scalar(1)}
    agree(write_graph(tmp_path / "one.onnx", nodes, given))


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("transposed", [0, 1])
def test_a_product(tmp_path: Path, alpha: float, transposed: int) -> None:
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["out"], transB=transposed, alpha=alpha),
    ]
    weight = floats(5, 192) if transposed else floats(192, 5)
    agree(write_graph(tmp_path / "one.onnx", nodes, {"w": weight, "b": floats(5)}))


def test_sizes_are_computed_while_tracing(tmp_path: Path) -> None:
    """Shape, arithmetic with it, and constants made of it."""
    nodes = [
        helper.make_node("Shape", ["images"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["count"]),
        helper.make_node("Unsqueeze", ["count", "axis"], ["counts"]),
        helper.make_node("Slice", ["shape", "two", "four"], ["sides"]),
        helper.make_node("ReduceProd", ["sides"], ["area"], keepdims=1),
        helper.make_node("Div", ["area", "eight"], ["rows"]),
        helper.make_node("Concat", ["counts", "minus", "rows"], ["target"], axis=0),
        helper.make_node("Reshape", ["images", "target"], ["table"]),
        helper.make_node("ConstantOfShape", ["target_of_ones"], ["ones"], value=_one()),
        helper.make_node("Cast", ["rows"], ["rows_f"], to=1),
        helper.make_node("Mul", ["table", "rows_f"], ["scaled"]),
        helper.make_node("Concat", ["counts", "single", "rows"], ["target_of_ones"], axis=0),
        helper.make_node("Concat", ["scaled", "ones"], ["out"], axis=1),
    ]
    nodes.insert(8, nodes.pop(11))
    given = {
        "first": np.array(0, np.int64),
        "axis": whole(0),
        "two": whole(2),
        "four": whole(4),
        "eight": whole(8),
        "minus": whole(-1),
        "single": whole(1),
    }
    agree(write_graph(tmp_path / "one.onnx", nodes, given))


def test_a_scale_of_a_size(tmp_path: Path) -> None:
    """As attention has it: 1 / sqrt(a size beside the batch's)."""
    nodes = [
        helper.make_node("Shape", ["images"], ["shape"]),
        helper.make_node("Slice", ["shape", "three", "far"], ["last"]),
        helper.make_node("Cast", ["last"], ["length"], to=1),
        helper.make_node("Sqrt", ["length"], ["root"]),
        helper.make_node("Div", ["one", "root"], ["scale"]),
        helper.make_node("Mul", ["images", "scale"], ["out"]),
    ]
    given = {"three": whole(3), "far": whole(2**62), "one": scalar(1)}
    agree(write_graph(tmp_path / "one.onnx", nodes, given))


def _one() -> Any:
    return helper.make_tensor("value", 1, [1], [1.0])

"""ONNX files that are taken, and those that are refused in a line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ccam_deploy.errors import SourceError, ToleranceError
from ccam_deploy.export import preparation
from ccam_deploy.export.from_onnx.agreement import (
    require_agreement,
    run_file,
    value_before_activation,
)
from ccam_deploy.export.from_onnx.names import node_scopes
from ccam_deploy.export.from_onnx.network import OnnxNetwork
from ccam_deploy.export.program import build_program
from ccam_deploy.export.scores import with_logits
from ccam_deploy.export.sources import load_model, model_file_type
from tests.command import success
from tests.export.onnx_files import network, run, write_graph, write_network
from tests.helpers import noise
from tests.networks import tiny

SIZE = (16, 24)
RELU = helper.make_node("Relu", ["images"], ["out"], "one")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network's file, with a dynamic batch."""
    return write_network(tmp_path_factory.mktemp("files") / "tiny.onnx", tiny(), SIZE, dynamo=False)


def changed(file: Path, path: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(file)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def test_a_file_is_known_by_its_content(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "model.bin"
    other.write_bytes(file.read_bytes())
    assert model_file_type(other) == "onnx"
    loaded = load_model(other)
    assert isinstance(loaded, OnnxNetwork)
    images = torch.from_numpy(noise(2, 3, *SIZE))
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), tiny()(images))


@pytest.mark.parametrize("cut", [0.3, 0.999])
def test_truncated_files_are_refused(file: Path, tmp_path: Path, cut: float) -> None:
    content = file.read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(content[: int(len(content) * cut)])
    with pytest.raises(SourceError) as raised:
        load_model(path)
    assert str(raised.value).startswith(f"{path} is ")
    assert "\n" not in str(raised.value)


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    path.write_text("something else")
    with pytest.raises(SourceError, match=r"text\.onnx is not a readable ONNX file"):
        load_model(path)


def external(location: str, offset: int = 0, length: int = 24) -> Callable[[onnx.ModelProto], None]:
    """Put a weight into another file."""

    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        size = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": location, "offset": offset, "length": length or size}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))

    return change


@pytest.mark.parametrize(
    ("location", "offset", "length", "message"),
    [
        ("../secret", 0, 0, 'in "../secret", outside of its folder; weights must lie beside'),
        ("inside/../../secret", 0, 0, "outside of its folder"),
        ("link", 0, 0, 'in "link", outside of its folder'),
        ("", 0, 0, 'in "", outside of its folder'),
        (".", 0, 0, "outside of its folder"),
        ("nowhere", 0, 0, 'keeps weights in "nowhere", which is missing'),
        ("short", 0, 4096, 'lies past the end of "short"'),
        ("short", -8, 8, 'lies past the end of "short"'),
        ("short", 2**62, 2**62, 'lies past the end of "short"'),
    ],
)
def test_weights_elsewhere_are_refused(
    file: Path, tmp_path: Path, location: str, offset: int, length: int, message: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(10_000))
    (folder / "short").write_bytes(bytes(16))
    (folder / "link").symlink_to(tmp_path / "secret")
    path = changed(file, folder / "model.onnx", external(location, offset, length))
    with pytest.raises(SourceError) as raised:
        load_model(path)
    assert message in str(raised.value)


def test_an_absolute_path_of_weights_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(10_000))
    path = tmp_path / "folder" / "model.onnx"
    path.parent.mkdir()
    with pytest.raises(SourceError, match="outside of its folder"):
        load_model(changed(file, path, external(str(tmp_path / "weights"))))


@pytest.mark.slow
def test_weights_beside_the_file_and_in_half_precision(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(file)
    onnx.save(model, tmp_path / "far.onnx", save_as_external_data=True, size_threshold=0)
    images = noise(2, 3, *SIZE)
    with torch.no_grad():
        expected = tiny()(torch.from_numpy(images)).numpy()
        got = network(tmp_path / "far.onnx")(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-6)
    checked: list[int] = []
    check = onnx.checker.check_model

    def recorded(model: onnx.ModelProto) -> None:
        checked.append(model.ByteSize())
        check(model)

    monkeypatch.setattr(onnx.checker, "check_model", recorded)
    load_model(tmp_path / "far.onnx")
    far = (tmp_path / "far.onnx").stat().st_size
    assert checked[0] < far + 500, "of more than 2 GB the checker would say that it is damaged"
    half = changed(file, tmp_path / "half.onnx", in_half)
    loaded = network(half)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    program = build_program(loaded.trace(SIZE))
    assert 0 < require_agreement(loaded.file, images, program) < 1e-2


def in_half(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    del model.graph.value_info[:]


QUANTISE = helper.make_node("QuantizeLinear", ["images", "one", "zero"], ["q"], "rounded")
BACK = helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["out"])


def graph(*nodes: Any, **settings: Any) -> Callable[[Path], Path]:
    given = {"one": np.float32(1) * np.ones(()), "zero": np.zeros((), np.uint8)}
    constants = {name: np.asarray(value) for name, value in given.items()}
    constants["one"] = constants["one"].astype(np.float32)
    used = {name for node in nodes for name in node.input}
    kept = {name: value for name, value in constants.items() if name in used}
    return lambda path: write_graph(path, nodes, kept, **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (graph(RELU, opset=8), "has opset 8; an export takes 9 and newer"),
        (graph(QUANTISE, BACK), 'is quantised (node "rounded" is a QuantizeLinear), and rounding'),
        (graph(RELU, shape=("n", 3, 8)), "takes images: float[?, 3, 8]; it must take images of fl"),
        (
            graph(RELU, shape=("n", 4, 8, 8)),
            "takes images: float[?, 4, 8, 8]; it must take images of 1",
        ),
        (
            graph(RELU, kind=TensorProto.INT64),
            "takes images: int64[?, 3, 8, 8]; it must take images of f",
        ),
        (
            graph(helper.make_node("Hardmax", ["images"], ["out"], "last")),
            'has the operator Hardmax (node "last"), which an export cannot take over',
        ),
        (
            graph(helper.make_node("Relu", ["images"], ["out"], "far", domain="com.else")),
            'has the operator com.else.Relu (node "far")',
        ),
    ],
)
def test_files_that_cannot_be_taken(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    path = make(tmp_path / "model.onnx")
    with pytest.raises(SourceError) as raised:
        load_model(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_several_inputs_and_outputs_are_named(file: Path, tmp_path: Path) -> None:
    def second_input(model: onnx.ModelProto) -> None:
        model.graph.input.add().CopyFrom(helper.make_tensor_value_info("flag", 1, [1]))

    def second_output(model: onnx.ModelProto) -> None:
        model.graph.output.add().CopyFrom(helper.make_tensor_value_info("images", 1, None))

    with pytest.raises(SourceError, match="takes images, flag; it must take one batch of images"):
        load_model(changed(file, tmp_path / "a.onnx", second_input))
    with pytest.raises(SourceError, match="it must give logits alone, or call them logits"):
        load_model(changed(file, tmp_path / "b.onnx", second_output))


def test_a_huge_constant_is_not_made(tmp_path: Path) -> None:
    node = helper.make_node("ConstantOfShape", ["sizes"], ["huge"], "bomb")
    add = helper.make_node("Add", ["images", "huge"], ["out"])
    sizes = np.array([2**20, 2**20], np.int64)
    path = write_graph(tmp_path / "model.onnx", [node, add], {"sizes": sizes})
    with pytest.raises(
        SourceError, match=r'the node "bomb" .* cannot be exported: it makes a const'
    ):
        load_model(path)


def test_a_node_that_does_not_run_is_named(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["images", "w"], ["out"], "product")
    path = write_graph(tmp_path / "model.onnx", [node], {"w": np.ones((5, 2), np.float32)})
    with pytest.raises(SourceError, match=r'the node "product" \(MatMul\) does not run: '):
        network(path).trace(SIZE)


@pytest.mark.slow
def test_images_with_channels_last(file: Path, tmp_path: Path) -> None:
    """As Keras has them; ONNX Runtime gets them so."""
    nodes = [
        helper.make_node("Transpose", ["images"], ["moved"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["moved", "w"], ["maps"], "first/conv"),
        helper.make_node("GlobalAveragePool", ["maps"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["out"]),
    ]
    weight = noise(5, 3, 3, 3)
    path = write_graph(tmp_path / "last.onnx", nodes, {"w": weight}, shape=("n", 16, 24, 3))
    loaded = network(path)
    assert loaded.file.shape == (3, 16, 24)
    images = noise(3, 3, *SIZE)
    expected = run(path, images.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(run_file(loaded.file, images), expected, atol=1e-6)
    program = build_program(loaded.trace(SIZE))
    assert require_agreement(loaded.file, images, program) < 1e-6


@pytest.mark.slow
def test_another_file_does_not_agree(file: Path, tmp_path: Path) -> None:
    def scale(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "head.bias")
        array = numpy_helper.to_array(tensor) + 0.1
        tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))

    other = network(changed(file, tmp_path / "other.onnx", scale))
    program = build_program(network(file).trace(SIZE))
    with pytest.raises(ToleranceError, match=r"does not agree with it in ONNX Runtime: outputs"):
        require_agreement(other.file, noise(1, 3, *SIZE), program)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["Softmax", "LogSoftmax", "Sigmoid"])
def test_logits_before_a_sure_end_are_compared(tmp_path: Path, end: str) -> None:
    """Behind it, all files agree: their outputs are 0 and 1."""
    names = ["pooled", "flat", "logits", "out"]
    kinds = ["GlobalAveragePool", "Flatten", "Add", end]
    nodes = [
        helper.make_node(kind, [source, "bias"] if kind == "Add" else [source], [name])
        for kind, source, name in zip(kinds, ["images", *names], names, strict=False)
    ]
    bias = np.array([60, 20, 20], np.float32)
    loaded, other = (
        network(write_graph(tmp_path / f"{place}.onnx", nodes, {"bias": values}))
        for place, values in enumerate((bias, bias * 1.5))
    )
    images = noise(2, 3, 8, 8)
    program = build_program(loaded.trace((8, 8)))
    if end != "LogSoftmax":
        assert require_agreement(other.file, images, program) < 1e-4
    assert value_before_activation(other.file) == "logits"
    logits = with_logits(program)
    assert require_agreement(loaded.file, images, logits, "logits") < 1e-6
    with pytest.raises(ToleranceError, match=r"outputs differ by 3\.3e-01"):
        require_agreement(other.file, images, logits, "logits")


@pytest.mark.slow
def test_an_export_compares_the_logits_of_a_file_that_ends_in_a_softmax(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []

    def compare(*arguments: Any) -> float:
        compared.append("".join(arguments[3:]))
        return require_agreement(*arguments)

    def end(model: onnx.ModelProto) -> None:
        (output,) = model.graph.output
        model.graph.node.append(helper.make_node("Softmax", [output.name], ["shares"]))
        output.name = "shares"

    monkeypatch.setattr(preparation, "require_agreement", compare)
    path = changed(file, tmp_path / "softmax.onnx", end)
    success("export", path, "--output", tmp_path / "bundle")
    assert compared == ["", onnx.load(file).graph.output[0].name]


@pytest.mark.parametrize("batch", ["n", 1])
def test_a_file_may_leave_the_batch_out(tmp_path: Path, batch: str | int) -> None:
    """As networks do that end in a squeeze, where they get one image."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Squeeze", ["pooled"], ["out"]),
    ]
    path = write_graph(tmp_path / "squeezed.onnx", nodes, shape=(batch, 3, 8, 8))
    images = noise(3, 3, 8, 8)
    loaded = network(path)
    np.testing.assert_allclose(run_file(loaded.file, images), images.mean((2, 3)), atol=1e-6)
    assert require_agreement(loaded.file, images, build_program(loaded.trace((8, 8)))) < 1e-6


def test_what_the_logits_do_not_need_is_left_out(tmp_path: Path) -> None:
    """The best class, lists of outputs, and operators that no export knows."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
        helper.make_node("ArgMax", ["logits"], ["out"]),
        helper.make_node("SequenceConstruct", ["logits"], ["list"]),
    ]
    path = write_graph(tmp_path / "more.onnx", nodes)

    def name_outputs(model: onnx.ModelProto) -> None:
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
        several = helper.make_tensor_sequence_value_info("list", TensorProto.FLOAT, None)
        model.graph.output.extend([logits, several])

    loaded = network(changed(path, tmp_path / "named.onnx", name_outputs))
    images = noise(2, 3, 8, 8)
    np.testing.assert_allclose(
        loaded(torch.from_numpy(images)).numpy(), images.mean((2, 3)), atol=1e-6
    )


@pytest.mark.parametrize(("weights", "groups", "channels"), [((6, 1, 3, 3), 3, 3), ((4, 1), 1, 1)])
def test_channels_that_are_left_open_are_those_of_the_convolution(
    tmp_path: Path, weights: tuple[int, ...], groups: int, channels: int
) -> None:
    shape = (*weights, 3, 3)[:4]
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["maps"], group=groups),
        helper.make_node("GlobalAveragePool", ["maps"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["out"]),
    ]
    path = write_graph(tmp_path / "open.onnx", nodes, {"w": noise(*shape)}, ("b", "c", "h", "w"))
    assert network(path).file.shape == (channels, 0, 0)


def test_half_precision_inside_is_known(file: Path, tmp_path: Path) -> None:
    """It shows in outputs that differ more than those of float32."""
    nodes = [
        helper.make_node("Cast", ["images"], ["halves"], to=TensorProto.FLOAT16),
        helper.make_node("GlobalAveragePool", ["halves"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["out"], to=TensorProto.FLOAT),
    ]
    assert network(write_graph(tmp_path / "half.onnx", nodes)).file.half
    assert not network(file).file.half


NAMES = {
    "/layer1/layer1.0/conv1/Conv": ("layer1", "layer1.0", "layer1.0.conv1"),
    "/layer1/layer1.0/downsample/downsample.0/Conv": (
        "layer1",
        "layer1.0",
        "layer1.0.downsample",
        "layer1.0.downsample.0",
    ),
    "/features/features.3/Relu_1": ("features", "features.3"),
    "model/block1/conv/Conv2D": ("model", "model.block1", "model.block1.conv"),
    "Conv_12": ("Conv_12",),
    "/Flatten": ("Flatten",),
    "": ("Relu",),
}


def test_nodes_are_named_by_their_modules() -> None:
    nodes = [helper.make_node("Relu", ["a"], ["b"], name) for name in (*NAMES, "")]
    assert node_scopes(nodes) == [*NAMES.values(), ("Relu_1",)]
    recorded = helper.make_node("Relu", ["a"], ["b"], "node_relu_1")
    scopes = "['', 'layer1', 'layer1.0', 'relu']"
    recorded.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    assert node_scopes([recorded]) == [("layer1", "layer1.0")]
    recorded.metadata_props[0].value = "__import__('os')"
    assert node_scopes([recorded]) == [("node_relu_1",)]

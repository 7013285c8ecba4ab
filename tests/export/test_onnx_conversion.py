"""Graphs become ONNX without being traced again, and by the long way where they must be."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import fx, nn

from ccam_deploy.arrays import Floats
from ccam_deploy.export import onnx_conversion
from ccam_deploy.export.autodiff import differentiate
from ccam_deploy.export.graph_editing import aten
from ccam_deploy.export.layers import find_layers
from ccam_deploy.export.onnx_conversion import GraphInput, to_onnx
from ccam_deploy.export.onnx_registry import registered_operators, shared_registry
from ccam_deploy.export.program import Program, build_program, trace_model
from tests.helpers import noise
from tests.networks import tiny

SIZE = (3, 32, 48)
INPUTS = {"images": GraphInput((2, *SIZE), "batch")}


@pytest.fixture(scope="module")
def program() -> Program:
    return build_program(trace_model(tiny(), SIZE))


def _nodes(model: ir.Model) -> list[tuple[str, int, int]]:
    return [(node.op_type, len(node.inputs), len(node.outputs)) for node in model.graph]


def _weights(model: ir.Model) -> Counter[bytes]:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return Counter(tensor.tobytes() for tensor in tensors if tensor is not None)


def _run(model: ir.Model) -> Floats:
    """What a graph of images [2, 3, 4, 6] computes."""
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    values: Floats = session.run(None, {"images": noise(2, 3, 4, 6)})[0]
    return values


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("the graph is traced again")


def test_a_graph_of_known_operators_is_not_traced_again(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.export, "export", _refuse)
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", _refuse)
    model = to_onnx(program.graph, INPUTS, ["logits"])
    assert [str(size) for size in model.graph.inputs[0].shape or ()] == ["batch", "3", "32", "48"]
    assert [value.name for value in model.graph.outputs] == ["logits"]


@pytest.mark.slow
def test_the_long_way_gives_the_same_graph(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = differentiate(program, find_layers(program))
    results: Any = parts.backbone.graph.output_node().args[0]
    outputs = [f"output_{index}" for index in range(len(results))]
    short = to_onnx(parts.backbone, INPUTS, outputs)

    def refuse(*_: object) -> None:
        raise AttributeError("another version of PyTorch")

    monkeypatch.setattr(onnx_conversion, "_traced_program", refuse)
    long = to_onnx(parts.backbone, INPUTS, outputs)
    assert _nodes(short) == _nodes(long)
    assert _weights(short) == _weights(long)


def test_without_the_registry_each_conversion_builds_its_own(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.onnx._internal.exporter import _registration

    monkeypatch.setattr(_registration, "ONNXRegistry", type("ONNXRegistry", (), {}))
    with shared_registry():
        assert not hasattr(_registration.ONNXRegistry, "from_torchlib")


@pytest.mark.slow
def test_the_registry_is_built_once_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    before = ONNXRegistry.__dict__["from_torchlib"]
    with shared_registry():
        first, second = (ONNXRegistry().from_torchlib(opset_version=18) for _ in range(2))
        named = ONNXRegistry().from_torchlib()
    assert first is second is named
    assert "aten::relu" in (registered_operators() or ())
    assert ONNXRegistry.__dict__["from_torchlib"] is before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operator", "arguments", "options"),
    [
        (aten.logit.default, (), {}),
        (aten.rsub.Scalar, (1,), {}),
        (aten.var.correction, ([-1],), {"correction": 0, "keepdim": True}),
        (aten.adaptive_avg_pool2d.default, ([2, 3],), {}),
        (aten.adaptive_avg_pool2d.default, ([4, 6],), {}),
    ],
)
def test_an_operator_that_onnx_lacks_is_decomposed_by_itself(
    operator: Any,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = fx.Graph()
    images = graph.placeholder("images")
    graph.output((graph.call_function(operator, (images, *arguments), options),))
    module = fx.GraphModule(nn.Module(), graph)
    inputs = {"images": GraphInput((2, 3, 4, 6), "batch")}
    with monkeypatch.context() as patch:
        patch.setattr(onnx_conversion, "_retraced_program", _refuse)
        short = to_onnx(module, inputs, ["values"])
    monkeypatch.setattr(onnx_conversion, "_traced_program", _refuse)
    long = to_onnx(module, inputs, ["values"])
    assert [value.name for value in short.graph.outputs] == ["values"]
    assert _run(short).tobytes() == _run(long).tobytes()


def test_a_graph_that_fixes_the_batch_is_refused(program: Program) -> None:
    graph = fx.Graph()
    images = graph.placeholder("images")
    graph.output((graph.call_function(aten.reshape.default, (images, [2, 3])),))
    module = fx.GraphModule(nn.Module(), graph)
    with pytest.raises(ValueError, match="fixes an axis"):
        onnx_conversion._traced_program(module, {"images": GraphInput((2, 3), "batch")})

"""The graph that the doctor runs."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from ccam_deploy.checks import probe_graph


def test_tiny_graph_is_what_onnx_would_write() -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "tiny", [x], [y])
    expected = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    model = onnx.load_model_from_string(probe_graph.tiny_graph())
    onnx.checker.check_model(model, full_check=True)
    assert model == expected

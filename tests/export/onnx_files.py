"""ONNX files that tests make: of one node, and of networks by both of PyTorch's exporters."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from ccam_deploy.arrays import Floats
from ccam_deploy.export.from_onnx.network import OnnxNetwork, read_onnx
from ccam_deploy.export.program import quiet


def write_graph(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, NDArray[Any]] | None = None,
    shape: Sequence[int | str] = ("n", 3, 8, 8),
    opset: int = 18,
    kind: int = TensorProto.FLOAT,
) -> Path:
    """A graph of `images` and `out`."""
    inputs = [helper.make_tensor_value_info("images", kind, shape)]
    outputs = [helper.make_tensor_value_info("out", kind, None)]
    initializers = [numpy_helper.from_array(v, name) for name, v in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), "graph", inputs, outputs, initializers)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.else", 1)]
    model = helper.make_model(graph, opset_imports=imports)
    model.ir_version = 8
    path.write_bytes(model.SerializeToString())
    return path


def run(path: Path, images: NDArray[Any]) -> Floats:
    """The output of a file in ONNX Runtime, its optimiser switched off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: images})
    return np.asarray(output)


def write_network(
    path: Path, model: nn.Module, size: tuple[int, int], dynamo: bool, batch: int = 0
) -> Path:
    """A network's file by one of PyTorch's exporters, with a batch or, with 0, a dynamic one."""
    images = torch.zeros(batch or 2, 3, *size)
    settings: dict[str, Any] = {}
    if not batch and dynamo:
        settings["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    elif not batch:
        settings["dynamic_axes"] = {"images": {0: "batch"}}
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            model,
            (images,),
            path,
            dynamo=dynamo,
            input_names=["images"],
            external_data=False,
            **settings,
        )
    return path


def network(path: Path) -> OnnxNetwork:
    return read_onnx(path).eval()

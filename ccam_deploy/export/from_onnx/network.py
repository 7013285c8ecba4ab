"""An ONNX graph as a PyTorch module, whose constants are folded and whose batch is dynamic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.export import ExportedProgram

from ccam_deploy.errors import CcamError, SourceError, brief
from ccam_deploy.export.from_onnx import operators, resizing, shapes, windows
from ccam_deploy.export.from_onnx.call import Array, Call, Result, Value, as_tensor, is_symbolic
from ccam_deploy.export.from_onnx.names import node_scopes
from ccam_deploy.export.from_onnx.onnx_file import OnnxFile, read_onnx_file
from ccam_deploy.export.program import trace_model

RULES = operators.RULES | resizing.RULES | shapes.RULES | windows.RULES
_SMALL = 64
"""Whole numbers up to so many are sizes, which Python computes with; more are a tensor."""
_LARGEST = 2**28
"""How many values may be folded in a file without constants."""
_GROWTH = 8
"""How many more for each of a file's constants: casts, transposes and the like keep copies."""
_NAME = "operators."


def read_onnx(path: Path) -> OnnxNetwork:
    """Read a classifier from an ONNX file.

    Args:
        path: The file.

    Returns:
        A module that runs it.

    Raises:
        SourceError: The file is damaged, or is not a classifier whose operators are known.
    """
    return OnnxNetwork(*read_onnx_file(path))


class OnnxNetwork(nn.Module):
    """Runs the nodes of an ONNX classifier.

    Attributes:
        file: What the classifier takes and gives.
        scopes: The modules around each of the nodes that run, the outermost first.
    """

    def __init__(self, file: OnnxFile, model: onnx.ModelProto) -> None:
        """Fold the constants.

        Args:
            file: The classifier.
            model: The file's content.

        Raises:
            SourceError: An operator is unknown, or a constant cannot be computed.
        """
        super().__init__()
        self.file = file
        self._constants: dict[str, Value] = {}
        self.scopes: list[tuple[str, ...]] = []
        self._require_rules(model.graph.node)
        try:
            nodes = self._read(model.graph)
        except CcamError:
            raise
        except Exception as error:  # values of other sizes or types than the file says
            raise SourceError(f"{file.path} is damaged: {brief(error)}") from error
        self.operators = nn.ModuleList(nodes)
        self._register(nodes)

    def forward(self, images: Tensor) -> Tensor:
        """Run the nodes on images [B, C, H, W], whatever the file's own layout is."""
        file = self.file
        images = images.permute(0, 2, 3, 1) if file.channels_last else images
        values: dict[str, Value] = {file.input: images}
        for node in self.operators:
            assert isinstance(node, _Node)
            computed = [values[name] for name in node.inputs if name in values]
            of_sizes = bool(computed) and all(isinstance(one, np.ndarray) for one in computed)
            places = range(len(node.inputs))
            inputs = [self._input(node, place, values, of_sizes) for place in places]
            values.update(zip(node.outputs, node(*inputs), strict=False))
        if file.output not in values:
            raise SourceError(f"{file.path} gives a constant; it must give logits [batch, classes]")
        return as_tensor(values[file.output])

    def trace(self, size: tuple[int, int]) -> ExportedProgram:
        """Trace the network with a dynamic batch, its nodes named by the file's modules.

        Args:
            size: Height and width of the images where the file leaves them open.

        Raises:
            SourceError: An operator cannot be traced; the message names its node. Or the file
                gives logits for a fixed number of images.
        """
        channels, height, width = self.file.shape
        exported = trace_model(self, (channels, height or size[0], width or size[1]))
        self._require_dynamic_batch(exported)
        for node in exported.graph.nodes:
            names = [str(name) for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
            if names and names[-1].startswith(_NAME):
                scopes = self.scopes[int(names[-1].removeprefix(_NAME))]
                node.meta["nn_module_stack"] = {
                    scope: (scope, "torch.nn.Module") for scope in scopes
                }
        return exported

    def _require_dynamic_batch(self, exported: ExportedProgram) -> None:
        (name,) = exported.graph_signature.user_outputs
        (logits,) = (node.meta["val"] for node in exported.graph.nodes if node.name == name)
        if logits.dim() and not is_symbolic(logits.shape[0]):
            raise SourceError(
                f"{self.file.path} gives logits {list(logits.shape)} for any number of images; "
                "export the ONNX file with a dynamic batch"
            )

    def _read(self, graph: onnx.GraphProto) -> list[_Node]:
        """Read the constants, and fold those that nodes make of them; the nodes that are left."""
        for tensor in graph.initializer:
            self._constants[tensor.name] = _narrow(numpy_helper.to_array(tensor))
        self._room = _LARGEST + _GROWTH * sum(map(_size, self._constants.values()))
        nodes = []
        for node, around in zip(graph.node, node_scopes(graph.node), strict=True):
            if not self._fold(node):
                nodes.append(_Node(node, self.file))
                self.scopes.append(around)
        return nodes

    def _require_rules(self, nodes: Sequence[onnx.NodeProto]) -> None:
        for node in nodes:
            known = node.op_type in RULES or node.op_type == "Constant"
            if node.domain not in ("", "ai.onnx") or not known:
                name = f"{node.domain}.{node.op_type}".lstrip(".")
                raise SourceError(
                    f'{self.file.path} has the operator {name} (node "{node.name}"), '
                    "which an export cannot take over"
                )

    def _fold(self, node: onnx.NodeProto) -> bool:
        """Compute a node whose inputs are constants."""
        if node.op_type == "Constant":
            self._constants[node.output[0]] = _constant(node)
            return True
        if not all(not name or name in self._constants for name in node.input):
            return False
        operator = _Node(node, self.file, constant=True)
        inputs = [
            None
            if not name
            else _for_folding(self._constants[name], place in operator.known_inputs)
            for place, name in enumerate(node.input)
        ]
        self._require_room(operator, sum(_size(value) for value in inputs if value is not None))
        with torch.no_grad():
            results = operator(*inputs)
        self._room -= sum(map(_size, results))
        self._require_room(operator, 0)
        for name, result in zip(node.output, results, strict=False):
            array = result.numpy() if isinstance(result, Tensor) else result
            self._constants[name] = _narrow(np.array(array))
        return True

    def _require_room(self, operator: _Node, values: int) -> None:
        """Refuse constants that double from node to node, before memory is full of them."""
        if values > self._room:
            raise SourceError(
                f"{self.file.path} makes too many constants: {operator.label} is one too much"
            )

    def _register(self, nodes: Sequence[_Node]) -> None:
        """Make parameters and buffers of the constants that nodes read as tensors."""
        self._tensors: dict[str, str] = {}
        for node in nodes:
            for place, name in enumerate(node.inputs):
                value = self._constants.get(name)
                if value is None or name in self._tensors or place in node.known_inputs:
                    continue
                assert isinstance(value, np.ndarray)
                key = f"c{len(self._tensors)}"
                if value.dtype.kind == "f":
                    self.register_parameter(key, nn.Parameter(as_tensor(value), False))
                elif value.size > _SMALL:
                    self.register_buffer(key, as_tensor(value))
                else:
                    continue
                self._tensors[name] = key

    def _input(
        self, node: _Node, place: int, values: dict[str, Value], of_sizes: bool
    ) -> Value | None:
        """The value of an input; a constant beside sizes is an array for Python."""
        name = node.inputs[place]
        if not name:
            return None
        if name in values:
            return values[name]
        if name in self._tensors and place not in node.known_inputs and not of_sizes:
            return getattr(self, self._tensors[name])  # type: ignore[no-any-return]
        if name not in self._constants:
            raise SourceError(f'{self.file.path} has no value "{name}", which {node.label} reads')
        return self._constants[name]


class _Node(nn.Module):
    """One node of the graph."""

    def __init__(self, node: onnx.NodeProto, file: OnnxFile, constant: bool = False) -> None:
        super().__init__()
        self.kind, self.node_name = node.op_type, node.name
        self.inputs, self.outputs = tuple(node.input), tuple(node.output)
        self.known_inputs = set(shapes.KNOWN_INPUTS.get(node.op_type, ()))
        if node.op_type.startswith("Reduce"):
            self.known_inputs.add(1)
        self._attributes = {one.name: _attribute(one) for one in node.attribute}
        self._file = (file,)
        self._constant = constant

    @property
    def label(self) -> str:
        """How errors call it."""
        return f'the node "{self.node_name}" ({self.kind})' if self.node_name else self.kind

    def forward(self, *inputs: Value | None) -> list[Value]:
        """Compute the outputs."""
        (file,) = self._file
        call = Call(
            self.kind,
            self.node_name,
            self._attributes,
            file.opset,
            inputs,
            len(self.outputs),
            file.batch,
            self._constant,
        )
        try:
            return [_settled(value) for value in _listed(RULES[self.kind](call))]
        except CcamError:
            raise
        except NotImplementedError as error:
            raise SourceError(f"{file.path}: {self.label} cannot be exported: {error}") from error
        except Exception as error:
            raise SourceError(f"{file.path}: {self.label} does not run: {brief(error)}") from error


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, onnx.TensorProto):
        return _narrow(numpy_helper.to_array(value))
    return value


def _constant(node: onnx.NodeProto) -> Array:
    (attribute,) = node.attribute
    value = _attribute(attribute)
    if isinstance(value, np.ndarray):
        return value
    return np.array(value, np.float32 if attribute.name.startswith("value_float") else np.int64)


def _narrow(array: Array) -> Array:
    """Every floating-point type as float32."""
    floating = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
    return array.astype(np.float32) if floating else array


def _for_folding(value: Value, known: bool) -> Value:
    """Floating-point constants as tensors, unless the operator must know them."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not known:
        return as_tensor(value)
    return value


def _settled(value: Value) -> Value:
    """An array of objects as one of numbers, where none of them is a symbol."""
    if isinstance(value, Tensor) or value.dtype != object or any(map(is_symbolic, value.flat)):
        return value
    return np.array(value.tolist())


def _size(value: Value) -> int:
    return value.numel() if isinstance(value, Tensor) else value.size


def _listed(result: Result) -> Sequence[Value]:
    return [result] if isinstance(result, Tensor | np.ndarray) else result

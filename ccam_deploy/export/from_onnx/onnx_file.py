"""Reads an ONNX file: whole, of one image input and one output of logits, and not quantised."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, external_data_helper, helper, inliner

from ccam_deploy.errors import SourceError, brief

OLDEST_OPSET = 9
_UNCHECKED = "unchecked"
_CHANNELS = (1, 3)
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
_HALVES = frozenset((TensorProto.FLOAT16, TensorProto.BFLOAT16))
_MOST_NODES = 1_000_000
"""How many nodes a file may have once its functions are written out, which can double with each."""
_QUANTISED = re.compile(
    r"Q(uantize)?Linear.*|DequantizeLinear|DynamicQuantizeLinear|(Conv|MatMul)Integer"
)


@dataclass(frozen=True)
class OnnxFile:
    """A classifier in an ONNX file.

    Attributes:
        path: The file.
        opset: The version of ONNX's operators.
        input: The name of the images.
        output: The name of the logits.
        shape: Channels, height and width of an image; 0 for a side that is left open.
        channels_last: Whether the images are [B, H, W, C].
        batch: The batch that the file fixes; 0 where it is dynamic.
        type: ONNX's number of the images' type.
        half: Whether it computes in half precision somewhere.
    """

    path: Path
    opset: int
    input: str
    output: str
    shape: tuple[int, int, int]
    channels_last: bool
    batch: int
    type: int
    half: bool


def read_onnx_file(path: Path) -> tuple[OnnxFile, onnx.ModelProto]:
    """Read an ONNX file with its external data.

    Args:
        path: The file.

    Returns:
        What the file takes and gives, and its content.

    Raises:
        SourceError: The file is damaged, names files outside of its folder, is quantised, or does
            not hold a classifier of images.
    """
    model = _read_model(path)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < OLDEST_OPSET:
        raise SourceError(
            f"{path} has opset {opset}; an export takes {OLDEST_OPSET} and newer "
            "(onnx.version_converter raises it)"
        )
    output = _output(path, model)
    _keep_needed(model.graph, output)
    for node in model.graph.node:
        if _QUANTISED.fullmatch(node.op_type):
            raise SourceError(
                f'{path} is quantised (node "{node.name}" is a {node.op_type}), and rounding has '
                "no gradient; export the float32 model, with --precision int8 for 8 bits"
            )
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "nothing"
        raise SourceError(f"{path} takes {names}; it must take one batch of images")
    (images,) = inputs
    dims, kind = _dims(images), images.type.tensor_type.elem_type
    if kind not in _FLOATS or len(dims) != 4:
        raise SourceError(
            f"{path} takes {_described(images)}; it must take images of floats, in 4-D"
        )
    channels_last = dims[1] not in _CHANNELS and dims[3] in _CHANNELS
    batch, channels, height, width = (
        dims[place] for place in ((0, 3, 1, 2) if channels_last else range(4))
    )
    channels = channels or _channels_read(model.graph, images.name)
    if channels not in _CHANNELS:
        raise SourceError(
            f"{path} takes {_described(images)}; it must take images of 1 or 3 channels"
        )
    file = OnnxFile(
        path,
        opset,
        images.name,
        output,
        (channels, height, width),
        channels_last,
        batch,
        kind,
        kind in _HALVES or _has_halves(model),
    )
    return file, model


def _keep_needed(graph: onnx.GraphProto, output: str) -> None:
    """Remove the nodes that an output does not need, such as those of the best class."""
    needed, kept = {output}, []
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            needed.update(_names_read([node]))
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _names_read(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """The values that nodes read, and those that graphs within them read."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _names_read(graph.node)


def _channels_read(graph: onnx.GraphProto, images: str) -> int:
    """How many channels the convolution of the images reads; 3 where none says it."""
    weights = {tensor.name: tensor.dims for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Conv" and node.input[0] == images and node.input[1] in weights:
            groups = (helper.get_attribute_value(a) for a in node.attribute if a.name == "group")
            return int(weights[node.input[1]][1]) * int(next(groups, 1))
    return 3


def _has_halves(model: onnx.ModelProto) -> bool:
    """Whether constants are in half precision, or values are cast to it."""
    targets = (
        helper.get_attribute_value(attribute)
        for node in model.graph.node
        if node.op_type == "Cast"
        for attribute in node.attribute
        if attribute.name == "to"
    )
    types = (tensor.data_type for tensor in _tensors(model))
    return not _HALVES.isdisjoint(types) or not _HALVES.isdisjoint(targets)


def _output(path: Path, model: onnx.ModelProto) -> str:
    """The output of logits: the only one, or the one of that name."""
    names = [value.name for value in model.graph.output]
    if len(names) == 1:
        return str(names[0])
    if names.count("logits") == 1:
        return "logits"
    raise SourceError(
        f"{path} gives {', '.join(names) or 'nothing'}; "
        "it must give logits alone, or call them logits"
    )


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    """The sizes of a value, 0 for those that are left open."""
    return [max(dim.dim_value, 0) for dim in value.type.tensor_type.shape.dim]


def _described(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type.elem_type
    name = TensorProto.DataType.Name(kind).lower() if kind else "no tensor"
    return f"{value.name}: {name}[{', '.join(str(dim or '?') for dim in _dims(value))}]"


def _read_model(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load_model(path, load_external_data=False)
    except Exception as error:
        raise SourceError(
            f"{path} is not a readable ONNX file: {brief(error)}; copy or export it again"
        ) from error
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            _require_inside(path, tensor)
    try:
        for output in model.graph.output:  # whose shape the checker asks for, and nobody else
            if output.type.WhichOneof("value") in (None, "tensor_type"):
                output.type.tensor_type.shape.SetInParent()
        onnx.checker.check_model(_checked_part(model))
        if model.functions:
            _require_few_nodes(model)
            model = inliner.inline_local_functions(model)
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    except Exception as error:
        raise SourceError(f"{path} is damaged: {brief(error)}") from error
    return model


def _checked_part(model: onnx.ModelProto) -> onnx.ModelProto:
    """What ONNX's checker can take: no weights of other files, of which 2 GB are too much for it.

    It also refuses the first form of an operator that its authors have withdrawn, but runtimes run.
    """
    part = onnx.ModelProto()
    part.CopyFrom(model)
    outside = [t for t in part.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    known = {value.name for value in part.graph.input}
    for tensor in outside:
        part.graph.initializer.remove(tensor)
        if tensor.name not in known:
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            part.graph.input.append(value)
    for node in part.graph.node:
        if node.op_type == "GroupNormalization" and node.domain in ("", "ai.onnx"):
            node.domain = _UNCHECKED
    part.opset_import.append(helper.make_opsetid(_UNCHECKED, 1))
    return part


def _require_few_nodes(model: onnx.ModelProto) -> None:
    """Raise ValueError where functions that call functions would become too many nodes."""
    functions = {(function.domain, function.name): function for function in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(nodes: Iterable[onnx.NodeProto]) -> int:
        return sum(size_of_one(node) for node in nodes)

    def size_of_one(node: onnx.NodeProto) -> int:
        inner = sum(size(graph.node) for one in node.attribute for graph in (one.g, *one.graphs))
        key = node.domain, node.op_type
        if key in functions and key not in sizes:
            sizes[key] = size(functions[key].node)
        return inner + sizes.get(key, 1)

    count = size(model.graph.node)
    if count > _MOST_NODES:
        raise ValueError(f"its functions become {count} nodes, more than {_MOST_NODES}")


def _tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor in a model, those in attributes and in graphs within it included."""
    pending: list[Any] = [model.graph, *model.functions]
    while pending:
        graph = pending.pop()
        yield from getattr(graph, "initializer", ())
        for node in graph.node:
            for attribute in node.attribute:
                yield from ([attribute.t] if attribute.HasField("t") else [])
                yield from attribute.tensors
                pending += [attribute.g] if attribute.HasField("g") else []
                pending += list(attribute.graphs)


def _require_inside(path: Path, tensor: TensorProto) -> None:
    """Refuse external data outside of the file's folder, or past the end of its file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = str(entries.get("location", ""))  # what is no UTF-8 comes as bytes
    folder = path.parent.resolve()
    data = folder if "\0" in location else (folder / location).resolve()
    if not location or not data.is_relative_to(folder) or data == folder:
        raise SourceError(
            f'{path} keeps "{tensor.name}" in "{location}", outside of its folder; '
            "weights must lie beside the file"
        )
    if not data.is_file():
        raise SourceError(
            f'{path} keeps weights in "{location}", which is missing; put it beside it'
        )
    try:
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        whole = 0 <= int(entries.get("offset", 0)) <= end <= data.stat().st_size
    except ValueError:
        whole = False
    if not whole:
        raise SourceError(f'{path} is damaged: "{tensor.name}" lies past the end of "{location}"')

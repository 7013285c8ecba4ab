"""One graph of ATen operators as an ONNX model that is held in memory.

`torch.onnx.export` decomposes every program that it is given, which traces it again and takes ten
times as long as the conversion itself. The graphs of this package are traced and functional, so
they are handed over as programs that say so, and an operator that ONNX does not know is decomposed
by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.exported_program import ModuleCallEntry
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from ccam_deploy.errors import LoweringError
from ccam_deploy.export.expressible import plain_reason
from ccam_deploy.export.graph_editing import aten, placeholders
from ccam_deploy.export.onnx_registry import shared_registry
from ccam_deploy.export.program import quiet


@dataclass(frozen=True)
class GraphInput:
    """An input of a graph.

    Attributes:
        size: the shape of an example, which stands for any other length of its dynamic axis.
        axis: the name of the first axis, which is dynamic; inputs that share it share its length.
        dtype: the type of its elements.
    """

    size: tuple[int, ...]
    axis: str
    dtype: torch.dtype = torch.float32


def to_onnx(
    graph: fx.GraphModule,
    inputs: Mapping[str, GraphInput],
    outputs: Sequence[str],
) -> ir.Model:
    """Convert a functional graph of ATen operators to ONNX.

    Args:
        graph: its placeholders are `inputs` in their order, its constants are buffers.
        inputs: name of each input of the ONNX model -> what it holds.
        outputs: names of the outputs of the ONNX model.

    Returns:
        The model, with its weights in memory and without a trace of the tools that made it.

    Raises:
        LoweringError: ONNX cannot express an operator; see require_expressible, which names it.
    """
    with torch.no_grad(), quiet(), shared_registry():
        try:
            model = _convert(_traced_program(graph, inputs), inputs, outputs)
        except Exception:
            # The short cut leans on details of PyTorch; the long way has the errors that count.
            try:
                model = _convert(_retraced_program(graph, inputs), inputs, outputs)
            except Exception as error:
                raise LoweringError(
                    f"the model cannot be converted to ONNX: {plain_reason(error)}"
                ) from error
    _clean(model, inputs)
    return model


def _convert(
    program: ExportedProgram, inputs: Mapping[str, GraphInput], outputs: Sequence[str]
) -> ir.Model:
    converted = torch.onnx.export(program, dynamo=True, verbose=False)
    assert converted is not None
    graph = converted.model.graph
    # PyTorch 2.10 would name a value that is given twice before it makes two of it.
    for value, name in zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True):
        value.name = name
    return converted.model


def _retraced_program(graph: fx.GraphModule, inputs: Mapping[str, GraphInput]) -> ExportedProgram:
    """Trace a graph by PyTorch's own exporter."""
    # A tensor for each: the exporter makes one input of those that are the same tensor.
    examples = tuple(torch.zeros(value.size, dtype=value.dtype) for value in inputs.values())
    dims = {value.axis: Dim(value.axis) for value in inputs.values()}
    shapes = tuple({0: dims[value.axis]} for value in inputs.values())
    return torch.export.export(graph, examples, dynamic_shapes=shapes)


class _FunctionalProgram(ExportedProgram):
    """A program of which only the operators that ONNX lacks need a decomposition."""

    def run_decompositions(self, decomp_table: Any = None, **options: Any) -> ExportedProgram:
        """Replace the operators that the table has an entry for, one by one and in place."""
        table = decomp_table or {}
        for node in [node for node in self.graph.nodes if node.target in table]:
            _decompose(self.graph, node, table)
        results: Any = self.graph.output_node().args[0]
        for spec, result in zip(self.graph_signature.output_specs, results, strict=True):
            spec.arg = TensorArgument(result.name)
        return self


def _decompose(graph: fx.Graph, node: fx.Node, table: Mapping[Any, Callable[..., Any]]) -> None:
    """Put what an operator is made of in its place."""
    target: Any = node.target
    sources = node.all_input_nodes
    values = [source.meta["val"] for source in sources]
    if not all(isinstance(value, Tensor) for value in (*values, node.meta["val"])):
        raise TypeError(f"{target} takes or gives more than tensors")

    def operator(*tensors: Tensor) -> Any:
        by_source = dict(zip(sources, tensors, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), by_source.__getitem__)
        return target(*args, **kwargs)

    mode = node.meta["val"].fake_mode
    with mode, enable_python_dispatcher():
        parts = make_fx(operator, decomposition_table=table)(*values)
    if any(part.op == "get_attr" for part in parts.graph.nodes):
        raise TypeError(f"{target} is made of constants")
    with graph.inserting_before(node):
        copies = dict(zip(placeholders(parts), sources, strict=True))
        result = graph.graph_copy(parts.graph, copies)
    node.replace_all_uses_with(result)  # type: ignore[arg-type]
    graph.erase_node(node)


def _traced_program(graph: fx.GraphModule, inputs: Mapping[str, GraphInput]) -> ExportedProgram:
    """Wrap a graph up as an exported program: constants become inputs, every value gets a shape."""
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    lifted = fx.Graph()
    values: dict[fx.Node, Any] = {}
    copies: dict[fx.Node, fx.Node] = {}
    signature = ExportGraphSignature([], [])
    constants = [node for node in graph.graph.nodes if node.op == "get_attr"]
    for node in constants:
        values[node] = mode.from_tensor(getattr(graph, str(node.target)), static_shapes=True)
        copies[node] = lifted.placeholder(node.name)
        argument = TensorArgument(copies[node].name)
        signature.input_specs.append(
            InputSpec(InputKind.BUFFER, argument, str(node.target), persistent=True)
        )
    for node, value in zip(placeholders(graph), _fake_inputs(mode, inputs), strict=True):
        values[node], copies[node] = value, lifted.placeholder(node.name)
        argument = TensorArgument(copies[node].name)
        signature.input_specs.append(InputSpec(InputKind.USER_INPUT, argument, None))
    with mode, enable_python_dispatcher():
        for node in graph.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                # Other operators than the traced ones may have laid values out in another order.
                plain = node.target is aten.view.default
                target = aten.reshape.default if plain else node.target
                values[node] = target(*args, **kwargs)
                copies[node] = lifted.node_copy(node, copies.__getitem__)
    for node, twin in copies.items():
        twin.meta = {"val": values[node]}
    if environment.replacements:
        raise ValueError("the graph fixes an axis that must stay dynamic")
    results = [copies[node] for node in graph.graph.output_node().args[0]]  # type: ignore[index,union-attr]
    lifted.output(tuple(results))
    for node in results:
        argument = TensorArgument(node.name)
        signature.output_specs.append(OutputSpec(OutputKind.USER_OUTPUT, argument, None))
    return _FunctionalProgram(
        nn.Module(),
        lifted,
        signature,
        state_dict={str(node.target): getattr(graph, str(node.target)) for node in constants},
        range_constraints={},
        module_call_graph=[ModuleCallEntry("", None)],
    )


def _fake_inputs(mode: FakeTensorMode, inputs: Mapping[str, GraphInput]) -> list[Tensor]:
    """Tensors without values, whose first axes have a symbol for each name."""
    context: StatelessSymbolicContext[..., Any] = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC]
    )
    symbols: dict[str, Any] = {}
    for value in inputs.values():
        if value.axis not in symbols:
            line = torch.empty(value.size[0])
            source = ConstantSource(value.axis)
            fake = mode.from_tensor(line, symbolic_context=context, source=source)
            symbols[value.axis] = fake.shape[0]
    with mode:
        return [
            torch.empty((symbols[value.axis], *value.size[1:]), dtype=value.dtype)
            for value in inputs.values()
        ]


def _clean(model: ir.Model, inputs: Mapping[str, GraphInput]) -> None:
    """Give dynamic axes their names, and drop what tells of the tools and folders of the export."""
    names = {}
    for value, description in zip(model.graph.inputs, inputs.values(), strict=True):
        assert value.shape is not None
        names[value.shape[0]] = description.axis
    for value in _values(model):
        if value.shape is not None:
            sizes = [size if isinstance(size, int) else names.get(size) for size in value.shape]
            value.shape = ir.Shape(sizes)
        value.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version = "ccam-deploy", None


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs

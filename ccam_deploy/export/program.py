"""From a PyTorch classifier to one functional graph that the later steps work on."""

from __future__ import annotations

import copy
import logging
import operator
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from ccam_deploy.bundle.manifest import Activation
from ccam_deploy.errors import CcamError, LoweringError, SourceError, brief
from ccam_deploy.export.calling import call_with_images, may_be_logits
from ccam_deploy.export.graph_editing import (
    aten,
    drop_unused,
    fresh_constant,
    place_constant,
    placeholders,
    without_symbols,
)
from ccam_deploy.export.rewriting import rewrite_copies, rewrite_operators

_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
"""PyTorch's word for the module of a node that has none."""

_ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
}
_LOUD = {
    "torch.onnx": logging.ERROR,
    "onnxscript": logging.ERROR,
    "torch._subclasses.fake_tensor": logging.CRITICAL,
}


@dataclass(frozen=True)
class Program:
    """A classifier as one graph: images [B, C, H, W] float32 to logits [B, classes].

    Attributes:
        graph: Functional ATen operators with parameters as attributes. Each node's `meta["val"]`
            is its fake tensor, and `meta["nn_module_stack"]` names its module.
        image: The node of the images [B, C, H, W].
        logits: The node of the logits [B, classes].
        activation: What makes probabilities of the logits.
        single: Whether the model has one logit z, and `logits` are -z and z.
    """

    graph: fx.GraphModule
    image: fx.Node
    logits: fx.Node
    activation: Activation = "softmax"
    single: bool = False

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(self.logits.meta["val"].shape[1])

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of an image."""
        _, channels, height, width = self.image.meta["val"].shape
        return int(channels), int(height), int(width)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the converter's notes about its progress, deprecations and caught errors."""
    loggers = {logging.getLogger(name): level for name, level in _LOUD.items()}
    levels = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def stack_of(node: fx.Node) -> dict[str, str]:
    """Return the module calls around a node, outermost first: key of the call -> name."""
    stack = node.meta.get("nn_module_stack") or {}
    return {key: str(value[0]) for key, value in stack.items() if key != _NO_MODULE}


def name_of(node: fx.Node) -> str:
    """Return a node's name in the traced program, also where folding has replaced the node."""
    return str(node.meta.get("original_name", node.name))


def was_traced(node: fx.Node) -> bool:
    """Whether the traced program has a node of that name: not for parts of what was rewritten."""
    return "original_name" in node.meta or not node.meta.get("written")


def module_of(node: fx.Node) -> str:
    """Return the dotted name of the module that a node belongs to, "" for the model itself."""
    return list(stack_of(node).values() or [""])[-1]


def trace_model(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    constants: Mapping[str, Any] | None = None,
) -> ExportedProgram:
    """Trace a classifier with a dynamic batch, in evaluation mode, on the CPU and in float32.

    Args:
        model: The classifier, which is left as it was: a copy is traced.
        input_shape: Channels, height, width.
        constants: What is bound to inputs beside the images, by name.

    Returns:
        The exported program, which takes images and returns logits alone.

    Raises:
        SourceError: The model cannot be copied or traced, or returns no logits.
        OptionError: It has no input of a constant's name.
    """
    try:
        twin = copy.deepcopy(model).cpu().float().eval()
    except Exception as error:
        raise SourceError(
            f"the model cannot be copied ({brief(error)}); "
            "export it with torch.export and pass the .pt2 file"
        ) from error
    twin.requires_grad_(False)
    call_with_images(twin, torch.zeros(1, *input_shape), constants or {})
    shapes = ({0: Dim("batch", min=1)},)
    try:
        example = torch.zeros(2, *input_shape)
        with torch.no_grad(), quiet():
            return torch.export.export(twin, (example,), dynamic_shapes=shapes)
    except CcamError:
        raise
    except Exception as error:
        size = "x".join(str(side) for side in input_shape)
        reason = getattr(model, "tracing_advice", without_symbols(brief(error)))
        raise SourceError(
            f"torch.export cannot trace the model on images of {size}: {reason}"
        ) from error


def build_program(
    exported: ExportedProgram, keep: Collection[str] = (), fold: bool = True
) -> Program:
    """Make the functional graph of an exported classifier.

    Args:
        exported: The exported program.
        keep: Names of modules or nodes whose outputs must survive folding.
        fold: Fold batch normalisation into convolutions; False keeps the graph as traced.

    Returns:
        The classifier as one graph.

    Raises:
        SourceError: The program does not turn images [B, C, H, W] into logits [B, classes].
    """
    return program_from(decompose(exported), keep, fold)


def decompose(exported: ExportedProgram) -> ExportedProgram:
    """Rewrite an exported classifier in functional ATen operators.

    Args:
        exported: The exported program.

    Returns:
        The decomposed program.

    Raises:
        SourceError: The program does not turn images [B, C, H, W] into logits [B, classes].
    """
    _require_classifier(exported)
    try:
        with quiet():
            functional: ExportedProgram = exported.run_decompositions({})
    except Exception as error:
        raise SourceError(
            f"the traced program cannot be decomposed: {without_symbols(brief(error))}"
        ) from error
    return functional


def program_from(
    functional: ExportedProgram, keep: Collection[str] = (), fold: bool = True
) -> Program:
    """Make the graph of a decomposed program, which is left as it was.

    Args:
        functional: The decomposed program.
        keep: Names of modules or nodes whose outputs must survive folding.
        fold: Fold batch normalisation into convolutions; False keeps the graph as traced.

    Returns:
        The classifier as one graph.

    Raises:
        SourceError: The model gives constants, or changes its own buffers.
    """
    graph = _unlift(functional)
    _drop_assertions(graph)
    _plain_convolutions(graph)
    _plain_views(graph)
    rewrite_copies(graph)
    if fold:
        rewrite_operators(graph)
        _fold_batch_norms(graph, keep)
    _plain_global_pools(graph)
    drop_unused(graph)
    image = placeholders(graph)[0]
    outputs = graph.graph.output_node().args[0]
    logits = outputs[0] if isinstance(outputs, tuple | list) else outputs
    if not isinstance(logits, fx.Node):
        raise SourceError("the model's output is a constant; it must be logits [batch, classes]")
    return Program(graph, image, _without_sides(graph, logits))


def _without_sides(module: fx.GraphModule, logits: fx.Node) -> fx.Node:
    """[B, classes, 1, 1] to [B, classes]."""
    value = logits.meta["val"]
    if value.dim() == 2:
        return logits
    sides = list(range(2, value.dim()))
    with module.graph.inserting_after(logits):
        flat = module.graph.call_function(aten.squeeze.dims, (logits, sides))
    with value.fake_mode:
        flat.meta["val"] = value.squeeze(sides)
    module.graph.output_node().args = ((flat,),)
    module.recompile()
    return flat


def _require_classifier(exported: ExportedProgram) -> None:
    inputs = exported.graph_signature.user_inputs
    outputs = exported.graph_signature.user_outputs
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes}
    if len(inputs) != 1 or len(outputs) != 1:
        raise SourceError(
            f"the model has {len(inputs)} inputs and {len(outputs)} outputs; "
            "it must take images and return logits alone"
        )
    image, logits = values[str(inputs[0])], values.get(str(outputs[0]))
    if not isinstance(image, torch.Tensor) or image.dim() != 4 or image.shape[1] not in (1, 3):
        raise SourceError(
            f"the model's input is {_shape(image)}; it must be images [batch, 1 or 3, H, W]"
        )
    if not isinstance(logits, torch.Tensor) or not may_be_logits(logits):
        raise SourceError(f"the model's output is {_shape(logits)}; it must be [batch, classes]")
    if image.dtype != torch.float32:
        raise SourceError(f"the program takes {image.dtype}; export the model in float32")
    batch: int | torch.SymInt = image.shape[0]
    if not isinstance(batch, torch.SymInt) or batch != logits.shape[0]:
        raise SourceError(
            "the program has a fixed batch; export it again with "
            'dynamic_shapes=({0: torch.export.Dim("batch")},)'
        )


def _shape(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def _unlift(exported: ExportedProgram) -> fx.GraphModule:
    """Put parameters, buffers and constants back as attributes; keep images and logits only."""
    signature = exported.graph_signature
    if any(spec.kind != OutputKind.USER_OUTPUT for spec in signature.output_specs):
        raise SourceError("the model changes its own buffers or input in evaluation mode")
    root = nn.Module()
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    for node in exported.graph.nodes:
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if spec is None or spec.kind == InputKind.USER_INPUT:
            nodes[node] = graph.node_copy(node, lambda n: nodes[n])
            continue
        target = str(spec.target)
        value = exported.state_dict.get(target, exported.constants.get(target))
        if not isinstance(value, torch.Tensor):
            raise LoweringError(f'the model holds "{target}", which is not a tensor')
        nodes[node] = place_constant(root, graph, value, node.name)
        nodes[node].meta.update(node.meta)
    return fx.GraphModule(root, graph)


def _fold_batch_norms(module: fx.GraphModule, keep: Collection[str]) -> None:
    """Fold each batch normalisation into the convolution before it, else into a scale and shift."""
    for node in list(module.graph.nodes):
        if node.target is not aten._native_batch_norm_legit_no_training.default:
            continue
        source, weight, bias, mean, variance, _, epsilon = node.args
        read = _reader(module)
        scale = (read(variance) + epsilon).rsqrt()
        if weight is not None:
            scale = scale * read(weight)
        shift = -read(mean) * scale
        if bias is not None:
            shift = shift + read(bias)
        left = {name for key, name in stack_of(source).items() if key not in stack_of(node)}
        with module.graph.inserting_before(node):
            folded = None
            if not left.union([source.name]).intersection(keep):
                folded = _into_convolution(module, source, scale, shift)
            if folded is None:
                folded = _scale_and_shift(module, source, scale, shift)
        for user in list(node.users):
            if user.target is operator.getitem and user.args[1] == 0:
                folded.meta.update(user.meta, original_name=user.name)
                user.replace_all_uses_with(folded)
                module.graph.erase_node(user)


def _drop_assertions(module: fx.GraphModule) -> None:
    """Take out what only asserts of types and sizes what tracing has found."""
    for node in list(module.graph.nodes):
        if node.target in _ASSERTIONS and not node.users:
            module.graph.erase_node(node)


def _plain_convolutions(module: fx.GraphModule) -> None:
    """TorchScript's form of convolution, with settings of one library, as the plain one."""
    for node in module.graph.nodes:
        if node.target is aten._convolution.default:
            node.target = aten.convolution.default
            node.args = node.args[:9]


def _plain_views(module: fx.GraphModule) -> None:
    """Views as reshapes: how an operator lays its values out may depend on the batch."""
    for node in module.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default


def _plain_global_pools(module: fx.GraphModule) -> None:
    """Global average pooling as a mean: PyTorch's operator also sets strides in place."""
    for node in module.graph.nodes:
        if node.target is aten.adaptive_avg_pool2d.default and list(node.args[1]) == [1, 1]:
            node.target = aten.mean.dim
            node.args = (node.args[0], [2, 3], True)


def _reader(module: fx.GraphModule) -> Callable[[Any], torch.Tensor]:
    def computed(node: fx.Node) -> Any:
        if node.op == "get_attr":
            return getattr(module, str(node.target))
        if node.op != "call_function":
            raise LoweringError("the parameters of a normalisation depend on the images")
        args, kwargs = fx.map_arg((node.args, node.kwargs), computed)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def read(node: fx.Node) -> torch.Tensor:
        with torch.no_grad():
            value: torch.Tensor = computed(node).double()
        return value

    return read


def _into_convolution(
    module: fx.GraphModule, source: fx.Node, scale: torch.Tensor, shift: torch.Tensor
) -> fx.Node | None:
    plain = source.target is aten.conv2d.default
    plain |= source.target is aten.convolution.default and source.args[6] is False
    if not plain or source.meta["val"].dim() != 4 or len(source.users) != 1:
        return None
    weight, bias = source.args[1], source.args[2] if len(source.args) > 2 else None
    constants = [node for node in (weight, bias) if isinstance(node, fx.Node)]
    if any(node.op != "get_attr" for node in constants):
        return None
    read = _reader(module)
    kernel = read(weight) * scale[:, None, None, None]
    offset = shift if bias is None else shift + read(bias) * scale
    name = str(constants[0].target)
    new_weight = fresh_constant(module, kernel.float(), f"{name}_folded")
    new_bias = fresh_constant(module, offset.float(), f"{name}_folded_bias")
    arguments = (source.args[0], new_weight, new_bias, *source.args[3:])
    return module.graph.create_node("call_function", source.target, arguments)


def _scale_and_shift(
    module: fx.GraphModule, source: fx.Node, scale: torch.Tensor, shift: torch.Tensor
) -> fx.Node:
    rank = source.meta["val"].dim()
    shape = (1, -1) + (1,) * (rank - 2)
    factor = fresh_constant(module, scale.float().view(shape), "norm_scale")
    offset = fresh_constant(module, shift.float().view(shape), "norm_shift")
    scaled = module.graph.call_function(aten.mul.Tensor, (source, factor))
    scaled.meta |= {"val": source.meta["val"], "written": True}
    return module.graph.call_function(aten.add.Tensor, (scaled, offset))

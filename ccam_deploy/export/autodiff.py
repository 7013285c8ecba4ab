"""The gradient of a class score with respect to feature maps, as a graph without autograd.

The forward graph runs once under autograd on fake tensors while `make_fx` records every operator
of both directions. The record is then cut in two: what depends on the gradient that enters at
the logits is the gradient graph; what it needs from the rest are the backbone's residuals.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from ccam_deploy.errors import LayerError, LoweringError, brief
from ccam_deploy.export.layers import TargetLayer
from ccam_deploy.export.lowering import decompositions
from ccam_deploy.export.program import (
    Program,
    aten,
    cast,
    drop_unused,
    fresh_constant,
    module_of,
    quiet,
)


@dataclass(frozen=True)
class Differentiated:
    """The two halves of a differentiated classifier; every tensor has the batch first.

    backbone: images -> (logits, *features, *residuals).
    gradient: (*residuals, output_gradient [B, classes]) -> gradients of the feature maps.
    head: the last feature map -> logits; None where they depend on the image past it.
    """

    backbone: fx.GraphModule
    gradient: fx.GraphModule
    head: fx.GraphModule | None


def differentiate(
    program: Program, layers: Sequence[TargetLayer], dtype: torch.dtype = torch.float32
) -> Differentiated:
    """Differentiate a classifier's logits with respect to the feature maps of `layers`.

    dtype: what the graphs compute in; their inputs, outputs and parameters have it too.
    Raises LayerError for a layer that the logits do not depend on, LoweringError for an operator
    that cannot be differentiated or expressed.
    """
    joint = _record(program, layers, dtype)
    _sizes_from_batch(joint)
    _tidy(joint)
    _fold_constants(joint)
    _merge_equal_nodes(joint)
    return _split(joint, len(layers))


class Recorder(fx.Interpreter):
    """Runs the forward graph, keeps the feature maps, and knows where it is."""

    def __init__(self, module: fx.GraphModule, kept: Sequence[fx.Node]) -> None:
        super().__init__(module)
        self.kept: dict[fx.Node, Tensor] = {}
        self.current: fx.Node | None = None
        self._wanted = set(kept)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, keep its value if it is wanted, and follow its gradient."""
        self.current = n
        value = super().run_node(n)
        if n in self._wanted:
            self.kept[n] = value
        if isinstance(value, Tensor) and value.grad_fn is not None:
            # Backward, the node whose gradient is being recorded is the current one again.
            value.grad_fn.register_prehook(partial(self._turn_to, n))
        return value

    def _turn_to(self, node: fx.Node, gradients: tuple[Tensor, ...]) -> None:
        self.current = node


def _record(program: Program, layers: Sequence[TargetLayer], dtype: torch.dtype) -> fx.GraphModule:
    """Trace (image, output_gradient) -> (logits, *features, *gradients)."""
    mode = program.image.meta["val"].fake_mode
    with mode:
        image = torch.empty_like(program.image.meta["val"], dtype=dtype)
        output_gradient = torch.empty_like(program.logits.meta["val"], dtype=dtype)
    nodes = [layer.node for layer in layers]
    recorder = Recorder(program.graph, nodes)
    constants = {name: cast(value, dtype) for name, value in program.graph.named_buffers()}
    names = list(constants)
    buffers = [mode.from_tensor(value, static_shapes=True) for value in constants.values()]

    def both(buffers: list[Tensor], image: Tensor, output_gradient: Tensor) -> list[Tensor]:
        image = image.detach().requires_grad_()
        with torch.nn.utils.stateless._reparametrize_module(
            program.graph, dict(zip(names, buffers, strict=True))
        ):
            (scores,) = recorder.run(image)
        features = [recorder.kept[node] for node in nodes]
        gradients = torch.autograd.grad(scores, features, output_gradient, allow_unused=True)
        for layer, gradient in zip(layers, gradients, strict=True):
            if gradient is None:
                raise LayerError(f'the logits do not depend on layer "{layer.name}"')
        return [scores, *features, *gradients]

    try:
        with mode, enable_python_dispatcher(), sdpa_kernel(SDPBackend.MATH), quiet():
            joint = make_fx(both, decomposition_table=decompositions())(
                buffers, image, output_gradient
            )
    except LayerError:
        raise
    except Exception as error:
        where = _describe(recorder.current) if recorder.current else "the model"
        raise LoweringError(f"{where} cannot be lowered: {brief(error)}") from error
    return _constants_as_attributes(joint, constants)


def _describe(node: fx.Node) -> str:
    return f'operator {node.target} in module "{module_of(node) or "the model itself"}"'


def _constants_as_attributes(joint: fx.GraphModule, constants: dict[str, Tensor]) -> fx.GraphModule:
    placeholders = [node for node in joint.graph.nodes if node.op == "placeholder"]
    for node, (name, value) in zip(placeholders, constants.items(), strict=False):
        with joint.graph.inserting_before(node):
            constant = fresh_constant(joint, value, name)
            constant.meta.update(node.meta)
        node.replace_all_uses_with(constant)
        joint.graph.erase_node(node)
    joint.recompile()
    return joint


def _sizes_from_batch(joint: fx.GraphModule) -> None:
    """Write every size that is not known as a multiple of the first input's batch."""
    image = next(node for node in joint.graph.nodes if node.op == "placeholder")
    batch = image.meta["val"].shape[0].node.expr
    if batch.is_Integer:
        raise LoweringError("an operator in the model fixes the batch, which must stay free")
    sizes = [node for node in joint.graph.nodes if isinstance(node.meta.get("val"), torch.SymInt)]
    with joint.graph.inserting_after(_last_placeholder(joint)):
        whole = joint.graph.call_function(aten.sym_size.int, (image, 0))
    whole.meta["val"] = image.meta["val"].shape[0]
    for node in sizes:
        factor = node.meta["val"].node.expr / batch
        if not factor.is_Integer:
            raise LoweringError(
                f"a size in the model, {node.meta['val']}, is no multiple of the batch"
            )
        size = whole
        if factor != 1:
            with joint.graph.inserting_before(node):
                size = joint.graph.call_function(operator.mul, (whole, int(factor)))
            size.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(size)
        joint.graph.erase_node(node)


def _last_placeholder(joint: fx.GraphModule) -> fx.Node:
    *_, last = (node for node in joint.graph.nodes if node.op == "placeholder")
    assert isinstance(last, fx.Node)
    return last


def _tidy(joint: fx.GraphModule) -> None:
    """Undo what autograd and tracing did to operators that engines know in their plain form."""
    for node in list(joint.graph.nodes):
        if node.target in (aten.detach.default, aten.alias.default, aten.clone.default):
            node.replace_all_uses_with(node.args[0])
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        elif node.target is aten.t.default and _is_call(node.args[0], aten.t.default):
            node.replace_all_uses_with(node.args[0].args[0])
        elif _is_linear(node):
            bias, source, weight = node.args[0], node.args[1], node.args[2].args[0]
            _replace(joint, node, aten.linear.default, (source, weight, bias))
        elif node.target is aten.mm.default and _is_call(node.args[1], aten.t.default):
            _replace(joint, node, aten.linear.default, (node.args[0], node.args[1].args[0]))
        elif node.target is aten.max_pool2d_with_indices.default:
            _pool_without_indices(joint, node)
        elif node.target is aten.native_layer_norm.default:
            axes = [-1 - axis for axis in range(len(node.args[1]))]
            _own_statistics(joint, node, axes, node.args[4])
    joint.graph.eliminate_dead_code()
    joint.recompile()


def _is_linear(node: fx.Node) -> bool:
    """Whether a node is x·Wᵀ + b as PyTorch writes a linear layer."""
    if node.target is not aten.addmm.default or node.kwargs:
        return False
    return node.args[0].meta["val"].dim() == 1 and _is_call(node.args[2], aten.t.default)  # type: ignore[union-attr]


def _is_call(node: object, target: object) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _replace(joint: fx.GraphModule, node: fx.Node, target: Any, arguments: tuple[Any, ...]) -> None:
    with joint.graph.inserting_before(node):
        new = joint.graph.call_function(target, arguments)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    joint.graph.erase_node(node)


def _pool_without_indices(joint: fx.GraphModule, node: fx.Node) -> None:
    for user in list(node.users):
        if user.args[1] == 0:
            _replace(joint, user, aten.max_pool2d.default, node.args)


def _own_statistics(joint: fx.GraphModule, node: fx.Node, axes: list[int], epsilon: float) -> None:
    """Compute a normalisation's mean and inverse deviation, which engines do not return."""
    for user in list(node.users):
        if user.target is not operator.getitem or user.args[1] == 0:
            continue
        source = node.args[0]
        with joint.graph.inserting_before(user):
            if user.args[1] == 1:
                new = joint.graph.call_function(aten.mean.dim, (source, axes, True))
            else:
                variance = joint.graph.call_function(
                    aten.var.correction, (source, axes), {"correction": 0, "keepdim": True}
                )
                shifted = joint.graph.call_function(aten.add.Scalar, (variance, epsilon))
                new = joint.graph.call_function(aten.rsqrt.default, (shifted,))
        new.meta.update(user.meta)
        user.replace_all_uses_with(new)
        joint.graph.erase_node(user)


def _fold_constants(joint: fx.GraphModule) -> None:
    """Evaluate what depends on constants alone."""
    values: dict[fx.Node, Tensor] = {}
    for node in list(joint.graph.nodes):
        if node.op == "get_attr":
            values[node] = getattr(joint, str(node.target))
        elif node.op == "call_function" and _is_constant(node, values):
            arguments = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
            result = node.target(*arguments[0], **arguments[1])
            if isinstance(result, Tensor):
                values[node] = result
    for node, value in values.items():
        outside = [user for user in node.users if user not in values]
        if node.op == "get_attr" or not outside:
            continue
        with joint.graph.inserting_before(node):
            constant = fresh_constant(joint, value, f"{node.name}_constant")
        constant.meta.update(node.meta)
        node.replace_all_uses_with(constant, lambda user: user not in values)
    for node in reversed(list(values)):
        if not node.users:
            joint.graph.erase_node(node)
    drop_unused(joint)


def _is_constant(node: fx.Node, values: dict[fx.Node, Tensor]) -> bool:
    return all(source in values for source in node.all_input_nodes)


def _merge_equal_nodes(joint: fx.GraphModule) -> None:
    """Common subexpressions: the backward pass computes some of the forward pass again."""
    seen: dict[Any, fx.Node] = {}
    for node in list(joint.graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        key = repr((node.op, str(node.target), node.args, sorted(node.kwargs.items())))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            joint.graph.erase_node(node)
    joint.recompile()


def _split(joint: fx.GraphModule, layers: int) -> Differentiated:
    image, output_gradient = (node for node in joint.graph.nodes if node.op == "placeholder")
    on_image, on_gradient = _depending(joint, image), _depending(joint, output_gradient)
    outputs = list(joint.graph.output_node().args[0])  # type: ignore[arg-type]
    forward, gradients = outputs[: 1 + layers], outputs[1 + layers :]
    crossing = {
        source: None
        for node in joint.graph.nodes
        if node in on_gradient
        for source in node.all_input_nodes
        if source in on_image and source not in on_gradient
    }
    backbone = _extract(joint, [image], [*forward, *crossing])
    gradient = _extract(joint, [*crossing, output_gradient], gradients)
    return Differentiated(backbone, gradient, _head(joint, forward[0], forward[-1]))


def _head(joint: fx.GraphModule, logits: fx.Node, features: fx.Node) -> fx.GraphModule | None:
    """The part between the last feature map and the logits, if it needs nothing else."""
    try:
        return _extract(joint, [features], [logits])
    except KeyError:
        return None


def _depending(joint: fx.GraphModule, root: fx.Node) -> set[fx.Node]:
    """The nodes whose values, not only whose batch size, depend on `root`."""
    found = {root}
    for node in joint.graph.nodes:
        if node.target is aten.sym_size.int:
            continue
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _extract(
    joint: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    """The part of a graph between some nodes, with the constants and sizes it uses."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta.update(node.meta)
    for node in joint.graph.nodes:
        if node in copies or node.op not in ("call_function", "get_attr"):
            continue
        if node.target is aten.sym_size.int:
            # The batch is the only size that is not known, and the first axis of every input.
            copies[node] = graph.call_function(aten.sym_size.int, (copies[inputs[0]], 0))
        elif all(source in copies for source in node.all_input_nodes):
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node in outputs))
    part = fx.GraphModule(joint, graph)
    drop_unused(part)
    return part

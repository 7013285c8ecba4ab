"""Passes that shorten a recorded graph and leave operators that engines know."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ccam_deploy.errors import LoweringError
from ccam_deploy.export.program import aten, drop_unused, fresh_constant


def simplify(joint: fx.GraphModule) -> None:
    """Shorten a graph that `make_fx` recorded, in place.

    Args:
        joint: The graph; the first axis of its first input is the batch.

    Raises:
        LoweringError: A size is no multiple of the batch.
    """
    _sizes_from_batch(joint)
    _leave_batch_open(joint)
    _tidy(joint)
    _fold_constants(joint)
    _merge_equal_nodes(joint)


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


def _leave_batch_open(joint: fx.GraphModule) -> None:
    """Let operators find the batch's size themselves: engines would compute it on the CPU."""
    for node in joint.graph.nodes:
        if node.target is aten.expand.default:
            source, sizes = node.args[0], list(node.args[1])
            shape = source.meta["val"].shape
            own = [None] * (len(sizes) - len(shape)) + list(shape)
            for axis, size in enumerate(sizes):
                if isinstance(size, fx.Node) and _is_same(size.meta["val"], own[axis]):
                    sizes[axis] = -1
            node.update_arg(1, sizes)
        elif node.target in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
            sizes = list(node.args[1])
            unknown = [axis for axis, size in enumerate(sizes) if isinstance(size, fx.Node)]
            if len(unknown) == 1 and -1 not in sizes:
                sizes[unknown[0]] = -1
                node.update_arg(1, sizes)
    joint.graph.eliminate_dead_code()


def _is_same(size: torch.SymInt, other: Any) -> bool:
    return isinstance(other, torch.SymInt) and bool(size.node.expr == other.node.expr)


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
            _compute_statistics(joint, node, axes, node.args[4])
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


def _compute_statistics(
    joint: fx.GraphModule, node: fx.Node, axes: list[int], epsilon: float
) -> None:
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

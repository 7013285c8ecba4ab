"""Passes that shorten a recorded graph and leave operators that engines know."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ccam_deploy.errors import LoweringError
from ccam_deploy.export.graph_editing import (
    Writer,
    aten,
    drop_unused,
    fresh_constant,
    placeholders,
    same_shape,
    take_place,
    without_symbols,
)
from ccam_deploy.export.normalisation import compute_statistics, rewrite_group_norms

_FILLED: dict[Any, tuple[int, float | None]] = {
    aten.full.default: (1, None),
    aten.full_like.default: (1, None),
    aten.new_full.default: (2, None),
    aten.zeros.default: (0, 0),
    aten.zeros_like.default: (0, 0),
    aten.new_zeros.default: (0, 0),
    aten.ones.default: (0, 1),
    aten.ones_like.default: (0, 1),
    aten.new_ones.default: (0, 1),
}
"""Operators that fill a tensor -> the value, or the position of the argument that is it."""

_BROADCASTING = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.where.self,
    aten.maximum.default,
    aten.minimum.default,
}


def simplify(joint: fx.GraphModule) -> None:
    """Shorten a graph that `make_fx` recorded, in place.

    Args:
        joint: The graph; the first axis of its first input is the batch.

    Raises:
        LoweringError: A size is no multiple of the batch.
    """
    leave_batch_open(joint)
    _tidy(joint)
    _fold_constants(joint)
    _merge_equal_nodes(joint)


def _sizes_from_batch(joint: fx.GraphModule) -> None:
    """Write every size that is not known as a multiple of the first input's batch."""
    image = placeholders(joint)[0]
    size = image.meta["val"].shape[0]
    if not isinstance(size, torch.SymInt) or size.node.expr.is_Integer:
        raise LoweringError("an operator in the model fixes the batch, which must stay free")
    batch = size.node.expr
    sizes = [node for node in joint.graph.nodes if isinstance(node.meta.get("val"), torch.SymInt)]
    with joint.graph.inserting_after(placeholders(joint)[-1]):
        whole = joint.graph.call_function(aten.sym_size.int, (image, 0))
    whole.meta["val"] = image.meta["val"].shape[0]
    for node in sizes:
        factor = node.meta["val"].node.expr / batch
        if not factor.is_Integer:
            found = without_symbols(node.meta["val"])
            raise LoweringError(f"a size in the model, {found}, is no multiple of the batch")
        size = whole
        if factor != 1:
            with joint.graph.inserting_before(node):
                size = joint.graph.call_function(operator.mul, (whole, int(factor)))
            size.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(size)
        joint.graph.erase_node(node)


def leave_batch_open(joint: fx.GraphModule) -> None:
    """Let operators find the batch's size themselves: engines would compute it on the CPU.

    Args:
        joint: The graph; the first axis of its first input is the batch.

    Raises:
        LoweringError: A size is no multiple of the batch.
    """
    _sizes_from_batch(joint)
    _expand_filled(joint)
    rewrite_group_norms(joint)
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
            if any(isinstance(size, fx.Node) for size in node.args[1]):
                node.update_arg(1, _open_shape(node))
        elif node.target is aten.flatten.using_ints and node.args[1:] not in ((1,), (1, -1)):
            node.target = aten.reshape.default
            node.args = (node.args[0], _open_shape(node))
    joint.graph.eliminate_dead_code()


def _open_shape(node: fx.Node) -> list[int]:
    """The shape of a node's value, with -1 for the axis that has the batch."""
    shape = node.meta["val"].shape
    return [-1 if isinstance(size, torch.SymInt) else int(size) for size in shape]


def _expand_filled(joint: fx.GraphModule) -> None:
    """Tensors filled with one value as that value, expanded."""
    for node in list(joint.graph.nodes):
        if node.target not in _FILLED or not isinstance(node.meta.get("val"), Tensor):
            continue
        position, value = _FILLED[node.target]
        value = node.args[position] if value is None else value
        if isinstance(value, fx.Node):
            continue
        like, write = node.meta["val"], Writer(joint, node)
        with joint.graph.inserting_before(node):
            filled = torch.full([1] * like.dim(), value, dtype=like.dtype)
            sizes = [_size_node(joint, size) for size in like.shape]
            new = write.call(aten.expand.default, write.constant(filled, "filled"), sizes)
        node.replace_all_uses_with(new)
        joint.graph.erase_node(node)


def _size_node(joint: fx.GraphModule, size: int | torch.SymInt) -> int | fx.Node:
    """A size as an argument of an operator: a number, or a multiple of the batch."""
    if not isinstance(size, torch.SymInt):
        return size
    image = placeholders(joint)[0]
    batch = image.meta["val"].shape[0]
    whole = joint.graph.call_function(aten.sym_size.int, (image, 0))
    whole.meta["val"] = batch
    factor = int(size.node.expr / batch.node.expr)
    if factor == 1:
        return whole
    product = joint.graph.call_function(operator.mul, (whole, factor))
    product.meta["val"] = size
    return product


def without_sizes(part: fx.GraphModule) -> None:
    """Expand constants over the batch by adding zeros that have it, in place.

    An engine would compute the batch's size on the CPU.

    Args:
        part: A graph whose inputs have the batch as their first axis.
    """
    inputs = [n for n in placeholders(part) if n.meta["val"].is_floating_point()]
    least = min(inputs, key=lambda n: n.meta["val"].shape[1:].numel(), default=None)
    for node in list(part.graph.nodes):
        if node.target is not aten.expand.default or least is None:
            continue
        source, sizes = node.args
        open_axes = [axis for axis, size in enumerate(sizes) if isinstance(size, fx.Node)]
        if len(open_axes) != 1:
            continue
        if _only_broadcast(node):
            node.replace_all_uses_with(source)
            continue
        with part.graph.inserting_before(node):
            new = _sum_over_batch(Writer(part, node), source, sizes, open_axes[0], least)
        node.replace_all_uses_with(new)
    part.graph.eliminate_dead_code()


def _only_broadcast(node: fx.Node) -> bool:
    """Whether all that reads an expanded value would expand it too."""
    for user in node.users:
        others = [source.meta["val"] for source in user.all_input_nodes if source is not node]
        shape = node.meta["val"].shape
        same = any(isinstance(value, Tensor) and same_shape(value.shape, shape) for value in others)
        if user.target not in _BROADCASTING or not same:
            return False
    return True


def _sum_over_batch(
    write: Writer, source: fx.Node, sizes: Sequence[Any], axis: int, values: fx.Node
) -> fx.Node:
    """A value [.., 1, ..] expanded to `sizes`, whose size at `axis` is a multiple of the batch.

    values: [B, ..], any that has the batch.
    """
    length = values.meta["val"].shape[1:].numel()
    rows = write.call(aten.reshape.default, values, [-1, length])
    first = write.call(aten.slice.Tensor, rows, 1, 0, 1)
    zeros = write.call(aten.mul.Scalar, first, 0)
    whole, batch = sizes[axis].meta["val"].node.expr, values.meta["val"].shape[0].node.expr
    factor = int(whole / batch)
    if factor != 1:
        more = write.constant(torch.zeros(1, factor, dtype=zeros.meta["val"].dtype), "zeros")
        zeros = write.call(aten.add.Tensor, zeros, more)
    shape = [1] * len(sizes)
    zeros = write.call(aten.reshape.default, zeros, [*shape[:axis], -1, *shape[axis + 1 :]])
    dtype = source.meta["val"].dtype
    if dtype != zeros.meta["val"].dtype:
        zeros = write.call(aten.to.dtype, zeros, dtype)
    one = [1 if place == axis else size for place, size in enumerate(sizes)]
    if list(source.meta["val"].shape) != one:
        source = write.call(aten.expand.default, source, one)
    add = aten.logical_or.default if dtype == torch.bool else aten.add.Tensor
    return write.call(add, source, zeros)


def _is_same(size: torch.SymInt, other: Any) -> bool:
    return isinstance(other, torch.SymInt) and bool(size.node.expr == other.node.expr)


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
            compute_statistics(joint, node)
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
    take_place(joint, node, new)


def _pool_without_indices(joint: fx.GraphModule, node: fx.Node) -> None:
    for user in list(node.users):
        if user.args[1] == 0:
            _replace(joint, user, aten.max_pool2d.default, node.args)


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

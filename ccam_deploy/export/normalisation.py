"""Normalisations with the statistics that their gradients need, which engines do not return."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ccam_deploy.export.graph_editing import Writer, aten, take_place


def compute_statistics(module: fx.GraphModule, node: fx.Node) -> None:
    """Compute a layer normalisation's mean and inverse deviation, in place.

    Args:
        module: A graph of fake tensors.
        node: A node of it, `native_layer_norm`, which gives both beside the result.
    """
    arguments: tuple[Any, ...] = node.args
    source, shape, _, _, epsilon = arguments
    axes = [-1 - axis for axis in range(len(shape))]
    for user, index in _read_results(node):
        if index == 0:
            continue
        with module.graph.inserting_before(user):
            mean, inverse = _statistics(Writer(module, user), source, axes, epsilon)
        take_place(module, user, (mean, inverse)[index - 1])


def rewrite_group_norms(module: fx.GraphModule) -> None:
    """Normalise groups of channels as instances, whose operator takes no sizes, in place.

    Args:
        module: A graph of fake tensors.
    """
    for node in list(module.graph.nodes):
        write = Writer(module, node)
        if node.target is aten.group_norm.default:
            defaults: tuple[Any, ...] = (None, None, 1e-5)
            arguments: tuple[Any, ...] = (*node.args, *defaults[len(node.args) - 2 :])
            source, groups, weight, bias, epsilon, *_ = arguments
            with module.graph.inserting_before(node):
                new = _normalised(write, source, groups, epsilon, (weight, bias))
            take_place(module, node, new)
        elif node.target is aten.native_group_norm.default:
            arguments = node.args
            source, weight, bias, _, _, _, groups, epsilon = arguments
            for user, index in _read_results(node):
                write = Writer(module, user)
                with module.graph.inserting_before(user):
                    if index == 0:
                        new = _normalised(write, source, groups, epsilon, (weight, bias))
                    else:
                        rows = _grouped(write, source, groups)
                        new = _statistics(write, rows, [2], epsilon)[index - 1]
                        new = write.call(aten.squeeze.dim, new, 2)
                take_place(module, user, new)
            module.graph.erase_node(node)


def _grouped(write: Writer, source: fx.Node, groups: int) -> fx.Node:
    """[B, C, ..] as [B, groups, values]."""
    length = source.meta["val"].shape[1:].numel() // groups
    return write.call(aten.reshape.default, source, [-1, groups, int(length)])


def _normalised(
    write: Writer,
    source: fx.Node,
    groups: int,
    epsilon: float,
    scale_and_shift: tuple[fx.Node | None, fx.Node | None],
) -> fx.Node:
    rows, dtype = _grouped(write, source, groups), source.meta["val"].dtype
    ones = write.constant(torch.ones(groups, dtype=dtype), "ones")
    zeros = write.constant(torch.zeros(groups, dtype=dtype), "zeros")
    options = (None, None, True, 0.0, epsilon, False)
    result = write.call(aten.instance_norm.default, rows, ones, zeros, *options)
    shape = [int(size) for size in source.meta["val"].shape[1:]]
    result = write.call(aten.reshape.default, result, [-1, *shape])
    for target, value in zip((aten.mul.Tensor, aten.add.Tensor), scale_and_shift, strict=True):
        if value is not None:
            wide = write.call(aten.reshape.default, value, [shape[0], *[1] * (len(shape) - 1)])
            result = write.call(target, result, wide)
    return result


def _statistics(
    write: Writer, source: fx.Node, axes: list[int], epsilon: float
) -> tuple[fx.Node, fx.Node]:
    """The mean and the inverse deviation over some axes, which they keep."""
    mean = write.call(aten.mean.dim, source, axes, True)
    centred = write.call(aten.sub.Tensor, source, mean)
    squares = write.call(aten.mul.Tensor, centred, centred)
    variance = write.call(aten.mean.dim, squares, axes, True)
    shifted = write.call(aten.add.Scalar, variance, epsilon)
    return mean, write.call(aten.rsqrt.default, shifted)


def _read_results(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """The nodes that read one of a node's results, and its position."""
    users = [user for user in node.users if user.target is operator.getitem]
    return [(user, int(user.args[1])) for user in users]  # type: ignore[arg-type]

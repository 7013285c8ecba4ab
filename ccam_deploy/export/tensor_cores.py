"""Half-precision graphs in the form that suits a GPU's tensor cores; the values are the same.

Engines such as ONNX Runtime run a graph as it is written. Convolutions of three channels are left
to slower units, and a bias and a ReLU in front of a pooling read and write several times as many
values as behind it: together they took half of a ResNet-18's forward pass on an H100.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch.nn import functional

from ccam_deploy.export.graph_editing import aten, drop_unused, fresh_constant, placeholders

ALIGNMENT = 8
"""Tensor cores take a multiple of so many channels."""

_WEIGHT, _BIAS, _TRANSPOSED = 1, 2, 6
_GROUPS = {aten.conv2d.default: 6, aten.convolution.default: 8}
"""Convolutions -> the place of the number of groups among their arguments."""


def widen_images(graph: fx.GraphModule) -> int:
    """Let convolutions that read the images take further channels, with weights of zero.

    Args:
        graph: A classifier's graph, changed in place; its first input is images [B, C, H, W].

    Returns:
        How many channels must be added to the images for it; 0 where nothing was changed, because
        something else reads the images, or they have as many channels as suits.
    """
    image = placeholders(graph)[0]
    readers = list(image.users)
    if not readers or not all(_is_plain(reader, image) for reader in readers):
        return 0
    weights = [_constant(graph, reader.args[_WEIGHT]) for reader in readers]
    extra = -weights[0].shape[1] % ALIGNMENT
    if extra:
        for reader, weight in zip(readers, weights, strict=True):
            with graph.graph.inserting_before(reader):
                wider = functional.pad(weight, (0, 0, 0, 0, 0, extra))
                node = fresh_constant(graph, wider, f"{reader.args[_WEIGHT]}_wider")
            reader.update_arg(_WEIGHT, node)
        drop_unused(graph)
    return extra


def pad_images(graph: fx.GraphModule) -> None:
    """Widen the images inside of a graph; see widen_images.

    Args:
        graph: A classifier's graph, changed in place; its first input is images [B, C, H, W].
    """
    extra = widen_images(graph)
    if not extra:
        return
    image = placeholders(graph)[0]
    readers = list(image.users)
    with graph.graph.inserting_after(image):
        wider = add_channels(graph.graph, image, extra)
    for reader in readers:
        reader.replace_input_with(image, wider)
    graph.recompile()


def add_channels(graph: fx.Graph, images: fx.Node, extra: int) -> fx.Node:
    """Write images [B, C + extra, H, W] whose further channels are zeros."""
    padding = [0, 0, 0, 0, 0, extra]
    return graph.call_function(aten.constant_pad_nd.default, (images, padding))


def pool_before_bias(graph: fx.GraphModule) -> None:
    """Put max pooling before the bias and the ReLU that it follows, where nothing else reads them.

    Neither a bias nor a ReLU, nor the rounding of their results, changes which value of a channel
    is the largest.

    Args:
        graph: The graph, changed in place.
    """
    for convolution, relu, pool in list(_pooled(graph)):
        bias = _constant(graph, convolution.args[_BIAS])
        pool.update_arg(0, convolution)
        convolution.update_arg(_BIAS, None)
        readers = list(pool.users)
        with graph.graph.inserting_after(pool):
            shift = fresh_constant(graph, bias.reshape(1, -1, 1, 1), f"{pool.name}_bias")
        with graph.graph.inserting_after(shift):
            shifted = graph.graph.call_function(aten.add.Tensor, (pool, shift))
        with graph.graph.inserting_after(shifted):
            result = graph.graph.call_function(aten.relu.default, (shifted,))
        for reader in readers:
            reader.replace_input_with(pool, result)
        graph.graph.erase_node(relu)
    drop_unused(graph)


def _pooled(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
    """Each convolution with a bias, the ReLU after it and the max pooling after that."""
    for pool in graph.graph.nodes:
        if pool.target is not aten.max_pool2d.default:
            continue
        relu = pool.args[0]
        if relu.target is not aten.relu.default or len(relu.users) > 1:
            continue
        convolution = relu.args[0]
        if (
            convolution.target in _GROUPS
            and len(convolution.users) == 1
            and _is_constant(convolution.args[_BIAS : _BIAS + 1])
        ):
            yield convolution, relu, pool


def _is_plain(node: fx.Node, image: fx.Node) -> bool:
    """Whether a node is a convolution of all channels of the images, by constant weights."""
    if node.target not in _GROUPS or node.args[0] is not image:
        return False
    place = _GROUPS[node.target]
    one_group = node.args[place:] in ((), (1,))
    transposed = node.target is aten.convolution.default and node.args[_TRANSPOSED] is True
    return one_group and not transposed and _is_constant(node.args[_WEIGHT : _WEIGHT + 1])


def _is_constant(values: tuple[object, ...]) -> bool:
    return len(values) == 1 and isinstance(values[0], fx.Node) and values[0].op == "get_attr"


def _constant(graph: fx.GraphModule, node: object) -> torch.Tensor:
    assert isinstance(node, fx.Node)
    value: torch.Tensor = getattr(graph, str(node.target))
    return value

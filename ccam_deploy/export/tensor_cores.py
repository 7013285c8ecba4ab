"""Half-precision graphs in the form that suits a GPU's tensor cores: the same but for rounding.

Engines such as ONNX Runtime run a graph as it is written. Convolutions of three channels are left
to slower units, images are turned round once for each mask, and a bias and a ReLU in front of a
pooling read and write several times as many values as behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx

from ccam_deploy.export.graph_editing import aten, drop_unused, fresh_constant, placeholders

ALIGNMENT = 8
"""Tensor cores take a multiple of so many channels."""

WIDER = "wider"
"""The matrix that gives pixels further channels of zeros."""

_CONVOLUTIONS = (aten.conv2d.default, aten.convolution.default)
_WEIGHT, _BIAS, _STRIDE, _PADDING = range(1, 5)
_DEFAULTS = (None, [1, 1], [0, 0], [1, 1], 1)
"""What comes after the weight of aten.conv2d.default where nothing is said."""


@dataclass(frozen=True)
class Blocks:
    """How images [B, C, H, W] are cut into blocks whose pixels become channels.

    Attributes:
        shape: C, H, W.
        side: Pixels along a block's side.
        channels: Of each pixel, those of the images and then zeros.
        dtype: Of the graph.
    """

    shape: tuple[int, int, int]
    side: int
    channels: int
    dtype: torch.dtype

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return self.shape[1] // self.side, self.shape[2] // self.side

    def of_images(self, graph: fx.GraphModule, images: fx.Node) -> fx.Node:
        """Write the images as [B, rows, columns, pixels of a block, channels].

        Args:
            graph: Where to write; a constant is added.
            images: [B, C, H, W].
        """
        call = graph.graph.call_function
        count = self.shape[0]
        rows, columns = self.grid
        sizes = [-1, count, rows, self.side, columns, self.side]
        cut = call(aten.reshape.default, (images, sizes))
        turned = call(aten.permute.default, (cut, [0, 2, 4, 3, 5, 1]))
        if self.channels > count:  # a product is faster than what pads in some engines
            wider = fresh_constant(graph, torch.eye(count, self.channels, dtype=self.dtype), WIDER)
            turned = call(aten.matmul.default, (turned, wider))
        sizes = [-1, rows, columns, self.side**2, self.channels]
        return call(aten.reshape.default, (turned, sizes))

    def of_masks(self, graph: fx.Graph, masks: fx.Node) -> fx.Node:
        """Write masks [N, 1, H, W] as [N, rows, columns, pixels of a block, 1]."""
        rows, columns = self.grid
        sizes = [-1, rows, self.side, columns, self.side]
        cut = graph.call_function(aten.reshape.default, (masks, sizes))
        turned = graph.call_function(aten.permute.default, (cut, [0, 1, 3, 2, 4]))
        sizes = [-1, rows, columns, self.side**2, 1]
        return graph.call_function(aten.reshape.default, (turned, sizes))

    def as_input(self, graph: fx.Graph, blocks: fx.Node) -> fx.Node:
        """Write the blocks of images as [B, channels of a block, rows, columns]."""
        sizes = [-1, *self.grid, self.side**2 * self.channels]
        flat = graph.call_function(aten.reshape.default, (blocks, sizes))
        return graph.call_function(aten.permute.default, (flat, [0, 3, 1, 2]))


def cut_into_blocks(graph: fx.GraphModule, shape: tuple[int, int, int]) -> Blocks | None:
    """Let the convolution that reads the images take blocks of them, and step by one block.

    A block has as many pixels along a side as the convolution steps by.

    Args:
        graph: A classifier's graph, changed in place; its first input is images.
        shape: C, H, W.

    Returns:
        The blocks that the first input is then to hold; None where nothing was changed, because
        other operators read the images, or the convolution steps by single pixels.
    """
    image = placeholders(graph)[0]
    readers = list(image.users)
    if len(readers) != 1 or not _is_plain(readers[0], image):
        return None
    (reader,) = readers
    arguments = _arguments(reader)
    (side, other_side), padding = arguments[_STRIDE], arguments[_PADDING]
    weight = _constant(graph, arguments[_WEIGHT])
    sizes = list(zip(shape[1:], weight.shape[2:], padding, strict=True))
    if side != other_side or side == 1 or not all(_fits(*size, side) for size in sizes):
        return None
    channels = shape[0]
    while channels * side**2 % ALIGNMENT:
        channels += 1
    margins = [_margin(kernel, pad, side) for _, kernel, pad in sizes]
    with graph.graph.inserting_before(reader):
        blocked = _blocked(weight, padding, side, channels, margins)
        arguments[_WEIGHT] = fresh_constant(graph, blocked, f"{reader.name}_blocks")
    arguments[_STRIDE], arguments[_PADDING] = [1, 1], margins
    reader.args = tuple(arguments)
    drop_unused(graph)
    return Blocks(shape, side, channels, weight.dtype)


def _fits(size: int, kernel: int, padding: int, side: int) -> bool:
    """Whether a convolution gives one line for each line of blocks."""
    return size % side == 0 and (size + 2 * padding - kernel) // side + 1 == size // side


def _margin(kernel: int, padding: int, side: int) -> int:
    """How many blocks before its own, or after it, a convolution reads; the same on both sides."""
    return max(-(-padding // side), (kernel - 1 - padding) // side)


def _blocked(
    weight: Tensor, padding: list[int], side: int, channels: int, margins: list[int]
) -> Tensor:
    """The weights [O, C, h, w] of a convolution for those of blocks, with zeros where it ends."""
    count, inputs, height, width = weight.shape
    kernel = [2 * margin + 1 for margin in margins]
    blocked = weight.new_zeros(count, side, side, channels, *kernel)
    for row, column in product(range(height), range(width)):
        (down, y), (along, x) = (
            divmod(place - pad, side) for place, pad in zip((row, column), padding, strict=True)
        )
        target = blocked[:, y, x, :inputs, down + margins[0], along + margins[1]]
        target.copy_(weight[:, :, row, column])
    return blocked.reshape(count, -1, *kernel)


def read_blocks(graph: fx.GraphModule, shape: tuple[int, int, int]) -> None:
    """Cut the images into blocks inside of a graph; see cut_into_blocks.

    Args:
        graph: A classifier's graph, changed in place; its first input is images.
        shape: C, H, W.
    """
    blocks = cut_into_blocks(graph, shape)
    if blocks is None:
        return
    image = placeholders(graph)[0]
    (reader,) = image.users
    with graph.graph.inserting_before(reader):
        cut = blocks.as_input(graph.graph, blocks.of_images(graph, image))
    reader.replace_input_with(image, cut)
    graph.recompile()


def pool_before_bias(graph: fx.GraphModule) -> None:
    """Put max pooling before the bias and the ReLU that it follows, where nothing else reads them.

    Neither a bias nor a ReLU, nor the rounding of their results, changes which value of a channel
    is the largest.

    Args:
        graph: The graph, changed in place.
    """
    for convolution, relu, pool in list(_pooled(graph)):
        readers = list(pool.users)
        pool.update_arg(0, convolution)
        shifted = _bias_after(graph, convolution, pool)
        with graph.graph.inserting_after(shifted):
            result = graph.graph.call_function(aten.relu.default, (shifted,))
        for reader in readers:
            reader.replace_input_with(pool, result)
        graph.graph.erase_node(relu)
    drop_unused(graph)


def add_biases_apart(graph: fx.GraphModule) -> None:
    """Add the bias of each convolution by an operator of its own.

    ONNX Runtime's convolutions on a GPU add it in a pass that takes twice as long.

    Args:
        graph: The graph, changed in place.
    """
    for node in list(graph.graph.nodes):
        if node.target in _CONVOLUTIONS and _is_constant(_arguments(node)[_BIAS]):
            readers = list(node.users)
            shifted = _bias_after(graph, node, node)
            for reader in readers:
                reader.replace_input_with(node, shifted)
    drop_unused(graph)


def _bias_after(graph: fx.GraphModule, convolution: fx.Node, node: fx.Node) -> fx.Node:
    """Take a convolution's bias away, and write a sum of it and a node."""
    bias = _constant(graph, convolution.args[_BIAS])
    convolution.update_arg(_BIAS, None)
    with graph.graph.inserting_after(node):
        shift = fresh_constant(graph, bias.reshape(1, -1, 1, 1), f"{node.name}_bias")
    with graph.graph.inserting_after(shift):
        return graph.graph.call_function(aten.add.Tensor, (node, shift))


def _pooled(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
    """Each convolution with a bias, the ReLU after it and the max pooling after that."""
    for pool in graph.graph.nodes:
        if pool.target is not aten.max_pool2d.default:
            continue
        relu: Any = pool.args[0]
        if relu.target is not aten.relu.default or len(relu.users) > 1:
            continue
        convolution = relu.args[0]
        if (
            convolution.target in _CONVOLUTIONS
            and len(convolution.users) == 1
            and _is_constant(_arguments(convolution)[_BIAS])
        ):
            yield convolution, relu, pool


def _arguments(convolution: fx.Node) -> list[Any]:
    """All arguments of a convolution."""
    given = list(convolution.args)
    return given + list(_DEFAULTS[len(given) - 2 :])


def _is_plain(node: fx.Node, image: fx.Node) -> bool:
    """Whether a node is a convolution of all channels of the images, by constant weights."""
    if node.target not in _CONVOLUTIONS or node.args[0] is not image:
        return False
    arguments = _arguments(node)
    dense = list(arguments[_PADDING + 1]) == [1, 1] and arguments[-1] == 1
    transposed = node.target is aten.convolution.default and arguments[_PADDING + 2]
    return dense and not transposed and _is_constant(arguments[_WEIGHT])


def _is_constant(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _constant(graph: fx.GraphModule, node: object) -> Tensor:
    assert isinstance(node, fx.Node)
    value: Tensor = getattr(graph, str(node.target))
    return value

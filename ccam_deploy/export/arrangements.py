"""Follows the map behind a traced classifier's tensors from the image to the logits.

Every operator either keeps the places of values, moves them in a way that is known, or leaves a
tensor whose arrangement is unknown; a residual sum takes it from the branch that has one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ccam_deploy.export.graph_editing import operator_name, same_shape
from ccam_deploy.export.places import Arrangement, Axis, Part, channel_axis, map_arrangement
from ccam_deploy.export.program import Program

Known = Arrangement | None
_Rule = Callable[["Followed", fx.Node], Known]


class Followed:
    """The arrangement of each tensor of a classifier.

    Args:
        program: The classifier.
    """

    def __init__(self, program: Program) -> None:
        self._batch = program.image.meta["val"].shape[0]
        self._known: dict[fx.Node, Known] = {program.image: map_arrangement(*program.input_shape)}
        self._pieces: dict[fx.Node, tuple[Known, ...]] = {}
        for node in program.graph.graph.nodes:
            if node.op == "call_function":
                self._follow(node)

    def of(self, node: object) -> Known:
        """The arrangement of a node's tensor; None where it is unknown."""
        return self._known.get(node) if isinstance(node, fx.Node) else None

    def sizes(self, node: fx.Node) -> list[tuple[int, bool]] | None:
        """Each axis's length, a batch counting as one, and whether it has the batch in it."""
        found = []
        for size in node.meta["val"].shape:
            if isinstance(size, int):
                found.append((size, False))
                continue
            factor = size.node.expr / self._batch.node.expr
            if not factor.is_Integer:
                return None
            found.append((int(factor), True))
        return found

    def _follow(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, tuple | list):
            self._pieces[node] = self._split(node, value)
        elif isinstance(value, torch.Tensor):
            rule = _RULES.get(operator_name(node.target), Followed._kept)
            arrangement = rule(self, node)
            if arrangement is not None and self._fits(arrangement, node):
                self._known[node] = arrangement

    def _fits(self, arrangement: Arrangement, node: fx.Node) -> bool:
        sizes = self.sizes(node)
        return sizes is not None and [axis.size for axis in arrangement.axes] == [
            size for size, _ in sizes
        ]

    def _split(self, node: fx.Node, values: Sequence[Any]) -> tuple[Known, ...]:
        """The arrangements of several results: pieces of an axis, or a normalised tensor first."""
        source = self.of(node.args[0])
        if source is None:
            return (None,) * len(values)
        name, rank = operator_name(node.target), len(source.axes)
        if name == "unbind":
            number = _axis_argument(node, 1, rank)
            return tuple(_selected(source, number, index) for index in range(len(values)))
        if name in ("split", "split_with_sizes", "chunk", "tensor_split"):
            number, start = _axis_argument(node, 2, rank), 0
            pieces: list[Known] = []
            for value in values:
                length = value.shape[number]
                if not isinstance(length, int):
                    return (None,) * len(values)
                pieces.append(_sliced(source, number, start, start + length, 1))
                start += length
            return tuple(pieces)
        same = same_shape(values[0].shape, node.args[0].meta["val"].shape)  # type: ignore[union-attr]
        return (source if same else None, *(None for _ in values[1:]))

    def _kept(self, node: fx.Node) -> Known:
        """The arrangement of the first of the sources of the same shape with the finest map."""
        shape = node.meta["val"].shape
        known = [
            self._known[source]
            for source in node.all_input_nodes
            if self.of(source) and same_shape(source.meta["val"].shape, shape)
        ]
        return max(known, key=lambda each: math.prod(each.grid) if each else 0, default=None)

    def _piece(self, node: fx.Node) -> Known:
        source, index = node.args
        pieces = self._pieces.get(source, ())  # type: ignore[arg-type]
        return pieces[index] if isinstance(index, int) and index < len(pieces) else None

    def _unknown(self, node: fx.Node) -> Known:
        return None

    def _reshaped(self, node: fx.Node) -> Known:
        source, sizes = self.of(node.args[0]), self.sizes(node)
        return None if source is None or sizes is None else source.regrouped(sizes)

    def _permuted(self, node: fx.Node) -> Known:
        source = self.of(node.args[0])
        order: Any = node.args[1]
        return None if source is None else Arrangement(tuple(source.axes[axis] for axis in order))

    def _transposed(self, node: fx.Node) -> Known:
        source = self.of(node.args[0])
        if source is None:
            return None
        axes = list(source.axes)
        first, second = node.args[1:3] if len(node.args) > 2 else (-2, -1)
        axes[first], axes[second] = axes[second], axes[first]  # type: ignore[index]
        return Arrangement(tuple(axes))

    def _cut(self, node: fx.Node) -> Known:
        source = self.of(node.args[0])
        if source is None:
            return None
        number = _axis_argument(node, 1, len(source.axes))
        bounds: Any = [*node.args[2:], None, None, None][:3]
        start, end, step = bounds[0] or 0, bounds[1], bounds[2] or 1
        if not all(isinstance(value, int | None) for value in (start, end)):
            return None
        length = source.axes[number].size
        start, end, step = slice(start, end, step).indices(length)
        return _sliced(source, number, start, end, step)

    def _chosen(self, node: fx.Node) -> Known:
        source = self.of(node.args[0])
        if source is None or not isinstance(node.args[2], int):
            return None
        return _selected(source, _axis_argument(node, 1, len(source.axes)), node.args[2])

    def _joined(self, node: fx.Node) -> Known:
        """Channels beside one another, or tokens without a place beside those that have one."""
        sources: Any = node.args[0]
        known = [self.of(source) for source in sources]
        placed = [n for n, each in enumerate(known) if each is not None and _has_places(each)]
        if not placed:
            return None
        first = known[placed[0]]
        assert first is not None
        number = _axis_argument(node, 1, len(first.axes))
        if not first.axes[number].spatial:
            return first.with_axis(number, channel_axis(node.meta["val"].shape[number]))
        lengths = [source.meta["val"].shape[number] for source in sources]
        if len(placed) > 1 or not all(isinstance(length, int) for length in lengths):
            return None
        axis = first.axes[number]
        before = axis.before + sum(lengths[: placed[0]])
        after = axis.after + sum(lengths[placed[0] + 1 :])
        return first.with_axis(number, Axis(axis.parts, before, after))

    def _resized(self, node: fx.Node) -> Known:
        """Pooled, padded or interpolated: rows and columns are others."""
        source, sizes = self.of(node.args[0]), self.sizes(node)
        if source is None or sizes is None or len(sizes) != len(source.axes):
            return None
        axes = [
            axis if axis.size == size else _resized_axis(axis, size)
            for axis, (size, _) in zip(source.axes, sizes, strict=True)
        ]
        known = [axis for axis in axes if axis is not None]
        return Arrangement(tuple(known)) if len(known) == len(axes) else None

    def _reduced(self, node: fx.Node) -> Known:
        source, dims = self.of(node.args[0]), node.args[1] if len(node.args) > 1 else None
        if source is None or not isinstance(dims, int | list | tuple):
            return None
        rank = len(source.axes)
        gone = {dim % rank for dim in ([dims] if isinstance(dims, int) else dims)}
        kept = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
        for number in gone:
            source = source.mixed(number, Axis()) or source.with_axis(number, Axis())
        return Arrangement(tuple(a for n, a in enumerate(source.axes) if kept or n not in gone))

    def _convolved(self, node: fx.Node) -> Known:
        value = node.meta["val"]
        sizes = self.sizes(node)
        if value.dim() != 4 or sizes is None or sizes[0] != (1, True):
            return None
        source = self.of(node.args[0])
        if source is not None and not source.channels_first:
            return None
        return map_arrangement(*(size for size, _ in sizes[1:]))

    def _linear(self, node: fx.Node) -> Known:
        source = self.of(node.args[0])
        return None if source is None else self._times_constant(source, node)

    def _multiplied(self, node: fx.Node) -> Known:
        """Rows of the first factor, columns of the second one."""
        added = operator_name(node.target) == "baddbmm"
        first, second = node.args[1:3] if added else node.args[-2:]
        left, right = self.of(first), self.of(second)
        rank = node.meta["val"].dim()
        if left is None or len(left.axes) != rank:
            return None
        if right is None:
            return self._times_constant(left, node)
        return left.with_axis(-1, right.axes[-1]) if len(right.axes) == rank else None

    def _times_constant(self, left: Arrangement, node: fx.Node) -> Known:
        return left.mixed(-1, channel_axis(node.meta["val"].shape[-1]))

    def _attended(self, node: fx.Node) -> Known:
        """Each value of the result lies where its query does."""
        query, values = self.of(node.args[0]), self.of(node.args[2])
        if query is None or values is None or len(query.axes) != len(values.axes):
            return None
        return query.with_axis(-1, values.axes[-1])


def _axis_argument(node: fx.Node, place: int, rank: int) -> int:
    given: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    return int(given) % rank


def _has_places(arrangement: Arrangement) -> bool:
    return any(axis.spatial for axis in arrangement.axes)


def _resized_axis(axis: Axis, size: int) -> Axis | None:
    """The axis in another length; None where it is more than channels, all rows or all columns."""
    if not axis.spatial:
        return channel_axis(size) if all(p.dimension == "channel" for p in axis.parts) else None
    if len(axis.parts) != 1 or axis.padded or axis.parts[0].stride != 1:
        return None
    return Axis((Part(axis.parts[0].dimension, size),) if size > 1 else ())


def _sliced(source: Arrangement, number: int, start: int, end: int, step: int) -> Known:
    axis = source.axes[number]
    if (start, end, step) == (0, axis.size, 1):
        return source
    if axis.padded:
        first, last = axis.before, axis.before + axis.inner
        if step != 1 or start > first or end < last:
            return None
        return source.with_axis(number, Axis(axis.parts, first - start, end - last))
    resized = _resized_axis(axis, len(range(start, end, step)))
    return None if resized is None else source.with_axis(number, resized)


def _selected(source: Arrangement, number: int, index: int) -> Known:
    axis = source.axes[number]
    if axis.spatial or any(part.dimension == "batch" for part in axis.parts):
        return None
    return source.without_axis(number)


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        ("view", "reshape", "unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"),
        Followed._reshaped,
    ),
    **dict.fromkeys(("permute",), Followed._permuted),
    **dict.fromkeys(("transpose", "swapaxes", "t"), Followed._transposed),
    **dict.fromkeys(("conv2d", "convolution"), Followed._convolved),
    **dict.fromkeys(("matmul", "bmm", "mm", "baddbmm"), Followed._multiplied),
    **dict.fromkeys(("mean", "sum", "amax"), Followed._reduced),
    **dict.fromkeys(
        (
            "max_pool2d",
            "avg_pool2d",
            "adaptive_avg_pool2d",
            "adaptive_max_pool2d",
            "upsample_nearest2d",
            "upsample_bilinear2d",
            "upsample_bicubic2d",
            "constant_pad_nd",
            "pad",
        ),
        Followed._resized,
    ),
    **dict.fromkeys(
        ("roll", "flip", "gather", "index", "index_select", "cumsum", "sort", "take_along_dim"),
        Followed._unknown,
    ),
    "getitem": Followed._piece,
    "slice": Followed._cut,
    "select": Followed._chosen,
    "cat": Followed._joined,
    "linear": Followed._linear,
    "scaled_dot_product_attention": Followed._attended,
}
"""How operators move values; any other keeps those of a source of the same shape."""

"""Where the values of a tensor lie in the image: maps behind tokens, windows and other layouts.

A transformer keeps its feature maps as tokens [B, tokens, C], as [B, h, w, C], or cut into
windows. An `Arrangement` tells for each axis of a tensor which parts of the batch, the rows, the
columns and the channels it runs through, so that the map [B, C, h, w] can be taken out of the
tensor and put back by moving values alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Dimension = Literal["batch", "row", "column", "channel"]
Size = int | torch.SymInt


@dataclass(frozen=True)
class Part:
    """A part of an axis, which steps through one dimension of the map.

    Attributes:
        dimension: What it steps through.
        size: How many steps it has; 1 for the batch, whose size is not known.
        stride: How many rows or columns a step goes; of no meaning for other dimensions.
    """

    dimension: Dimension
    size: int
    stride: int = 1

    @property
    def spatial(self) -> bool:
        """Whether it steps through rows or columns."""
        return self.dimension in ("row", "column")


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor.

    Attributes:
        parts: What it runs through, the slowest first.
        before: How many tokens without a place come before these, such as a class token.
        after: How many come after them.
    """

    parts: tuple[Part, ...] = ()
    before: int = 0
    after: int = 0

    @property
    def inner(self) -> int:
        """The number of steps of the parts; a batch counts as one."""
        return math.prod(part.size for part in self.parts)

    @property
    def size(self) -> int:
        """The axis's length; a batch counts as one."""
        return self.before + self.inner + self.after

    @property
    def spatial(self) -> bool:
        """Whether it runs through rows or columns."""
        return any(part.spatial for part in self.parts)

    @property
    def padded(self) -> bool:
        """Whether it has tokens without a place."""
        return bool(self.before or self.after)


@dataclass(frozen=True)
class Arrangement:
    """What each axis of a tensor runs through.

    Attributes:
        axes: The axes, in order.
    """

    axes: tuple[Axis, ...]

    @property
    def parts(self) -> list[Part]:
        """All parts, in the order of the axes."""
        return [part for axis in self.axes for part in axis.parts]

    @property
    def channels(self) -> int:
        """The number of channels of the map."""
        return self._length("channel")

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the map; 1 where no axis runs through rows or columns."""
        return self._length("row"), self._length("column")

    @property
    def plain(self) -> bool:
        """Whether the tensor is the map [B, C, h, w] itself."""
        return self.axes == map_arrangement(self.channels, *self.grid).axes

    @property
    def channels_first(self) -> bool:
        """Whether rows and columns are the last two of four axes, and no part of the second."""
        expected = map_arrangement(1, *self.grid).axes[2:]
        return len(self.axes) == 4 and self.axes[2:] == expected and not self.axes[1].spatial

    @property
    def left_out(self) -> int:
        """How many tokens have no place in the map."""
        return sum(axis.before + axis.after for axis in self.axes)

    @property
    def is_map(self) -> bool:
        """Whether the tensor holds exactly one feature map of more than one pixel per image."""
        batches = [part for part in self.parts if part.dimension == "batch"]
        padded = [axis for axis in self.axes if axis.padded]
        whole = all(self._whole(dimension) for dimension in ("row", "column"))
        apart = not padded or padded[0].spatial
        batch_first = not padded or self.axes[0].parts == tuple(batches)
        return (
            len(batches) == 1
            and len(padded) <= 1
            and whole
            and apart
            and batch_first
            and math.prod(self.grid) > 1
        )

    def to_map(self, value: Tensor) -> Tensor:
        """Take the map out of a tensor.

        Args:
            value: The tensor, of this arrangement.

        Returns:
            [B, C, h, w], without the tokens that have no place.
        """
        if self.plain:
            return value
        for number, axis in enumerate(self.axes):
            if axis.padded:
                value = value.narrow(number, axis.before, axis.inner)
        if self._grouped:
            value = value.reshape(self._sizes(self.parts, value))
        order = self._order()
        features = value.permute(order)
        if self._is_plain_order(order):
            return features
        batch = value.shape[0] if self._batch_alone else -1
        return features.reshape(batch, self.channels, *self.grid)

    def rest(self, value: Tensor) -> Tensor:
        """Take the tokens without a place out of a tensor.

        Args:
            value: The tensor, of this arrangement with `left_out` above 0.

        Returns:
            The tensor with these tokens alone on the axis that has them.
        """
        number, axis = self._padded()
        pieces = [
            value.narrow(number, 0, axis.before),
            value.narrow(number, axis.before + axis.inner, axis.after),
        ]
        kept = [piece for piece in pieces if piece.shape[number]]
        return kept[0] if len(kept) == 1 else torch.cat(kept, number)

    def from_map(self, features: Tensor, rest: Tensor | None = None) -> Tensor:
        """Put a map back in the place of a tensor's own.

        Args:
            features: [B, C, h, w].
            rest: The tokens without a place, as `rest` gives them.

        Returns:
            The tensor, of this arrangement.
        """
        if self.plain:
            return features
        order = self._order()
        if not self._is_plain_order(order):
            features = features.reshape(self._sizes([self.parts[n] for n in order], features))
        value = features.permute([order.index(place) for place in range(len(order))])
        if self._grouped:
            batch = features.shape[0] if self._batch_alone else -1
            holds = [any(part.dimension == "batch" for part in axis.parts) for axis in self.axes]
            sizes = [batch if held else a.inner for held, a in zip(holds, self.axes, strict=True)]
            value = value.reshape(sizes)
        if rest is None:
            return value
        number, axis = self._padded()
        first = rest.narrow(number, 0, axis.before)
        last = rest.narrow(number, axis.before, axis.after)
        pieces = [piece for piece in (first, value, last) if piece.shape[number]]
        return torch.cat(pieces, number)

    def with_axis(self, number: int, axis: Axis) -> Arrangement:
        """Return the arrangement with another axis in the place of one."""
        axes = list(self.axes)
        axes[number] = axis
        return Arrangement(tuple(axes))

    def mixed(self, number: int, axis: Axis) -> Arrangement | None:
        """Follow an operator that makes each value of one axis of all that were on it.

        Neighbours that are mixed become one place, so that the map is coarser: merged patches.

        Args:
            number: The axis.
            axis: What it is afterwards.

        Returns:
            The arrangement of the result; None where other values than those of a channel or of
            neighbours are mixed, or no place is left.
        """
        gone = self.axes[number]
        merged = {dimension: _neighbours(gone, dimension) for dimension in ("row", "column")}
        if gone.padded or not all(merged.values()) or _of_batch(gone):
            return None
        axes = [
            replace(other, parts=tuple(_coarser(part, merged) for part in other.parts))
            for other in self.axes
        ]
        axes[number] = axis
        places = gone.spatial and not any(other.spatial for other in axes)
        return None if places else Arrangement(tuple(axes))

    def without_axis(self, number: int) -> Arrangement:
        """Return the arrangement without one of its axes."""
        return Arrangement(self.axes[:number] + self.axes[number + 1 :])

    def regrouped(self, sizes: Sequence[tuple[int, bool]]) -> Arrangement | None:
        """Follow a change of shape that keeps the order of values.

        Args:
            sizes: For each new axis its length, a batch counting as one, and whether the batch is
                in it.

        Returns:
            The arrangement of the new shape; None where that cuts through a part.
        """
        waiting = list(_blocks(self.axes))
        axes = []
        for size, with_batch in sizes:
            axis = _take(waiting, size, with_batch)
            if axis is None:
                return None
            axes.append(axis)
        return None if waiting else Arrangement(tuple(axes))

    @property
    def _batch_alone(self) -> bool:
        return self.axes[0].parts == (Part("batch", 1),)

    @property
    def _grouped(self) -> bool:
        """Whether an axis has several parts, or none."""
        return any(len(axis.parts) != 1 for axis in self.axes)

    def _is_plain_order(self, order: Sequence[int]) -> bool:
        """Whether the parts in an order are the axes of the map."""
        dimensions = [self.parts[place].dimension for place in order]
        return dimensions == ["batch", "channel", "row", "column"]

    def _length(self, dimension: Dimension) -> int:
        return math.prod(part.size for part in self.parts if part.dimension == dimension)

    def _whole(self, dimension: Dimension) -> bool:
        """Whether the parts step through every row, or every column, once."""
        reached = 1
        for part in sorted(
            (part for part in self.parts if part.dimension == dimension),
            key=lambda part: part.stride,
        ):
            if part.stride != reached:
                return False
            reached *= part.size
        return True

    def _padded(self) -> tuple[int, Axis]:
        return next((n, axis) for n, axis in enumerate(self.axes) if axis.padded)

    def _order(self) -> list[int]:
        """The places of the parts in the order batch, channels, rows, columns."""
        rank = {"batch": 0, "channel": 1, "row": 2, "column": 3}
        parts = self.parts

        def key(place: int) -> tuple[int, int]:
            part = parts[place]
            return rank[part.dimension], -part.stride if part.spatial else place

        return sorted(range(len(parts)), key=key)

    def _sizes(self, parts: Sequence[Part], value: Tensor) -> list[Size]:
        batch: Size = value.shape[0] if self._batch_alone else -1
        return [batch if part.dimension == "batch" else part.size for part in parts]


def map_arrangement(channels: int, height: int, width: int) -> Arrangement:
    """Return the arrangement of a map [B, C, h, w]; an axis of length 1 has no part."""
    named: tuple[tuple[Dimension, int], ...] = (
        ("channel", channels),
        ("row", height),
        ("column", width),
    )
    parts = [(Part(dimension, size),) if size > 1 else () for dimension, size in named]
    return Arrangement((Axis((Part("batch", 1),)), *map(Axis, parts)))


def channel_axis(size: int) -> Axis:
    """Return an axis of channels."""
    return Axis((Part("channel", size),) if size > 1 else ())


def _of_batch(axis: Axis) -> bool:
    return any(part.dimension == "batch" for part in axis.parts)


def _neighbours(axis: Axis, dimension: str) -> int:
    """How many rows or columns in a row an axis runs through; 0 where they are not neighbours."""
    parts = [part for part in axis.parts if part.dimension == dimension]
    reached = 1
    for part in sorted(parts, key=lambda part: part.stride):
        if part.stride != reached:
            return 0
        reached *= part.size
    return reached


def _coarser(part: Part, merged: Mapping[str, int]) -> Part:
    """A part of what is left, where so many rows and columns became one."""
    return replace(part, stride=part.stride // merged[part.dimension]) if part.spatial else part


def _blocks(axes: Sequence[Axis]) -> Iterator[Part | Axis]:
    """The parts in order; an axis with tokens without a place cannot be taken apart."""
    for axis in axes:
        if axis.padded:
            yield axis
        else:
            yield from axis.parts


def _take(waiting: list[Part | Axis], size: int, with_batch: bool) -> Axis | None:
    """Take an axis of a size off the front of what waits."""
    parts: list[Part] = []
    while size > 1 or with_batch:
        if not waiting:
            return None
        block = waiting.pop(0)
        if isinstance(block, Axis):
            return block if not parts and block.size == size and not with_batch else None
        if block.dimension == "batch":
            if not with_batch:
                return None
            with_batch = False
        elif size % block.size == 0:
            size //= block.size
        elif block.size % size == 0:
            rest = block.size // size
            waiting.insert(0, replace(block, size=rest))
            block = replace(block, size=size, stride=block.stride * rest)
            size = 1
        else:
            return None
        parts.append(block)
    return Axis(tuple(parts))

"""The interface of every engine: named tensors in, named tensors out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.errors import BackendError

Array = NDArray[Any]


OWNER = "owner"
"""The input that tells, for each row, which row of the inputs along another axis belongs to it."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph.

    Attributes:
        name: The tensor's name.
        dtype: The type of its values.
        shape: The size of each axis, or a name for an axis whose size varies.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]

    def require_fit(self, value: Array) -> None:
        """Make sure that an array has the tensor's type and shape.

        Raises:
            BackendError: It has another type or shape.
        """
        fits = len(value.shape) == len(self.shape) and all(
            isinstance(size, str) or size == length
            for size, length in zip(self.shape, value.shape, strict=True)
        )
        if value.dtype != self.dtype or not fits:
            raise BackendError(
                f'input "{self.name}" is {value.dtype}{list(value.shape)}, '
                f"the graph takes {self.dtype}{list(self.shape)}"
            )


class Engine(ABC):
    """One graph, ready to run. Safe to call from several threads; close it when done.

    The graph's rows lie along the first axis that most inputs share and all outputs have: images
    for most graphs, masked images for the classifier.

    Attributes:
        inputs: The graph's inputs, in order.
        outputs: The graph's outputs, in order.
        limits: The largest size of each axis that has one, by the axis's name.
    """

    limits: Mapping[str, int] = MappingProxyType({})

    def __init__(self) -> None:
        self._closed = False
        self.inputs, self.outputs = self._load_impl()
        names = [spec.shape[0] for spec in self.inputs if spec.shape]
        axes = [name for name in names if isinstance(name, str)]
        self._row_axis = max(axes, key=axes.count, default="")

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph, in parts where there is more than it takes at a time.

        Args:
            feeds: One array for each input, of its dtype and shape.

        Returns:
            One array for each output, by name.

        Raises:
            BackendError: Inputs are missing or do not fit, or the engine itself fails.
        """
        if self._closed:
            raise BackendError("the engine was closed")
        for spec in self.inputs:
            if spec.name not in feeds:
                raise BackendError(f'input "{spec.name}" is missing')
            spec.require_fit(feeds[spec.name])
        arrays = {spec.name: feeds[spec.name] for spec in self.inputs}
        sizes = axis_sizes(self.inputs, arrays) if self.limits else {}
        if any(size > self.limits.get(axis, size) for axis, size in sizes.items()):
            values = self._run_in_parts(arrays, sizes)
        else:
            values = self._run_impl(arrays)
        return dict(zip((spec.name for spec in self.outputs), values, strict=True))

    def _run_in_parts(self, feeds: Mapping[str, Array], sizes: Mapping[str, int]) -> list[Array]:
        """Run parts within the limits and put their outputs together."""
        values: list[Array] = []
        for rows, part in self._parts(feeds, sizes):
            outputs = self._run_impl(part)
            if not values:
                count = sizes[self._row_axis]
                values = [np.empty((count, *output.shape[1:]), output.dtype) for output in outputs]
            for value, output in zip(values, outputs, strict=True):
                value[rows] = output
        return values

    def _parts(
        self, feeds: Mapping[str, Array], sizes: Mapping[str, int]
    ) -> Iterator[tuple[NDArray[np.intp], dict[str, Array]]]:
        """Split a run: the rows of each part, and its inputs."""
        for group, feeds_of_group in self._owner_groups(feeds, sizes):
            for chunk in _chunks(len(group), self.limits.get(self._row_axis)):
                yield group[chunk], self._slice(feeds_of_group, self._row_axis, chunk)

    def _owner_groups(
        self, feeds: Mapping[str, Array], sizes: Mapping[str, int]
    ) -> Iterator[tuple[NDArray[np.intp], dict[str, Array]]]:
        """Group rows so that what they belong to, by OWNER, is within its limit."""
        large = [a for a, n in sizes.items() if a != self._row_axis and n > self.limits.get(a, n)]
        if not large:
            yield np.arange(sizes[self._row_axis]), dict(feeds)
            return
        (axis, *_), owner = large, feeds.get(OWNER)
        if owner is None:
            raise BackendError(
                f'"{axis}" is {sizes[axis]}; the engine takes at most {self.limits[axis]}'
            )
        if len(owner) and not 0 <= owner.min() <= owner.max() < sizes[axis]:
            raise BackendError(
                f'input "{OWNER}" has rows {owner.min()} to {owner.max()} of "{axis}", '
                f"which has {sizes[axis]}"
            )
        for chunk in row_chunks(sizes[axis], self.limits[axis]):
            rows = np.flatnonzero((owner >= chunk.start) & (owner < chunk.stop))
            if len(rows) or (chunk.start == 0 and not len(owner)):
                part = self._slice(self._slice(feeds, axis, chunk), self._row_axis, rows)
                yield rows, part | {OWNER: part[OWNER] - chunk.start}

    def _slice(
        self, feeds: Mapping[str, Array], axis: str, rows: slice | NDArray[np.intp]
    ) -> dict[str, Array]:
        """Keep some rows of the inputs that lie along an axis."""
        return {
            spec.name: feeds[spec.name][rows] if spec.shape[:1] == (axis,) else feeds[spec.name]
            for spec in self.inputs
        }

    def close(self) -> None:
        """Free what the engine holds; closing twice does nothing."""
        if not self._closed:
            self._closed = True
            self._close_impl()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _load_impl(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Load the graph; return its inputs and its outputs, in order."""

    @abstractmethod
    def _run_impl(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Run the graph on inputs that fit, within its limits; return the outputs in order."""

    @abstractmethod
    def _close_impl(self) -> None:
        """Free what the engine holds."""


def row_chunks(count: int, size: int) -> Iterator[slice]:
    """Split rows into consecutive chunks.

    Args:
        count: How many rows there are.
        size: The most rows of a chunk.

    Yields:
        The slice of each chunk; all but the last have `size` rows.
    """
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def axis_sizes(specs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> dict[str, int]:
    """Look up the size of each axis that varies.

    Args:
        specs: The tensors.
        feeds: An array for each, of its shape.

    Returns:
        Sizes by the axes' names.

    Raises:
        BackendError: Two arrays disagree about an axis.
    """
    sizes: dict[str, int] = {}
    for spec in specs:
        for axis, size in zip(spec.shape, feeds[spec.name].shape, strict=True):
            if isinstance(axis, str) and sizes.setdefault(axis, size) != size:
                raise BackendError(
                    f'"{axis}" is {size} in input "{spec.name}", {sizes[axis]} in another one'
                )
    return sizes


def _chunks(count: int, limit: int | None) -> Iterator[slice]:
    """The chunks of some rows; a single one where there is no limit, or no row."""
    return row_chunks(count, limit) if limit and count else iter([slice(0, count)])

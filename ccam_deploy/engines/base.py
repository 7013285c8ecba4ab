"""What every engine is: named tensors in, named tensors out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.errors import BackendError

Array = NDArray[Any]


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output. shape: sizes, or names for those that vary."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]

    def check(self, value: Array) -> None:
        """Raise BackendError where an array is not what the graph takes."""
        fits = len(value.shape) == len(self.shape) and all(
            isinstance(size, str) or size == got
            for size, got in zip(self.shape, value.shape, strict=True)
        )
        if value.dtype != self.dtype or not fits:
            raise BackendError(
                f'input "{self.name}" is {value.dtype}{list(value.shape)}, '
                f"the graph takes {self.dtype}{list(self.shape)}"
            )


class Engine(ABC):
    """One graph, ready to run. Safe to call from several threads; close it when done.

    limits: the largest size of each axis that varies and has a limit.
    """

    limits: Mapping[str, int] = MappingProxyType({})

    def __init__(self) -> None:
        self._closed = False
        self.inputs, self.outputs = self._load_impl()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph. feeds: one array for each input, of its dtype and shape.

        Raises BackendError for missing or unfit inputs, and for what the engine itself reports.
        """
        if self._closed:
            raise BackendError("the engine was closed")
        for spec in self.inputs:
            if spec.name not in feeds:
                raise BackendError(f'input "{spec.name}" is missing')
            spec.check(feeds[spec.name])
        values = self._run_impl({spec.name: feeds[spec.name] for spec in self.inputs})
        return dict(zip((spec.name for spec in self.outputs), values, strict=True))

    def close(self) -> None:
        """Free what the engine holds; closing twice does nothing."""
        if not self._closed:
            self._closed = True
            self._close_impl()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _load_impl(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Load the graph; return its inputs and outputs in order."""

    @abstractmethod
    def _run_impl(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Run the graph on checked inputs; return the outputs in order."""

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

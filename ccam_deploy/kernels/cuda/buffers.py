"""The arrays that the kernels share, in typed groups.

A group says the same names of different things: how large its arrays are (`Spec`), where they lie
on a device, or what the host or a kernel reads. Numba is not needed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Generic, Self, TypeVar

from numpy.typing import DTypeLike

T = TypeVar("T")


@dataclass(frozen=True)
class Spec:
    """An array that the caller allocates.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        zeroed: Whether it must be zeros before its first use.
    """

    shape: tuple[int, ...]
    dtype: DTypeLike
    zeroed: bool = False


@dataclass(frozen=True)
class ArrayGroup(Generic[T]):
    """Arrays, or what stands for them, by field."""

    @classmethod
    def of(cls, arrays: Mapping[str, T]) -> Self:
        """Take the group's arrays from a mapping that may hold more, by the fields' names."""
        make: Callable[..., Self] = cls
        return make(**{field.name: arrays[field.name] for field in fields(cls)})

    def by_name(self) -> dict[str, T]:
        """Return the arrays by the fields' names."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class MaskCounts(ArrayGroup[T]):
    """How many masks there are, for P pairs and L layers.

    Attributes:
        counts: [P, L] int32, the collections of each layer; 0 where a layer's statistics are not
            finite, which the caller must refuse.
        starts: [P · L + 1] int32, the first mask of each pair and layer; the last element in use
            is the number of masks.
    """

    counts: T
    starts: T


@dataclass(frozen=True)
class MaskValues(ArrayGroup[T]):
    """Results for n masks.

    Attributes:
        flat: [n] uint8, 1 where a mask is all zeros.
        scores: [n] float32, of the masked images.
        weights: [n] float32, the softmax of the scores of each pair.
    """

    flat: T
    scores: T
    weights: T


@dataclass(frozen=True)
class PairValues(ArrayGroup[T]):
    """Results for P pairs, of L layers with C channels in all.

    Attributes:
        targets: [P] int64, classes.
        labels: [P, C] int32, the collection of each channel, from 0 in each layer.
        quality: [P, L, k_max] float32, the mean dispersion-separation ratio of each number of
            collections from k_min on; -1 after the last number that was tried.
        sums: [P, k_max · pixels] float32, the collection sums in [0, 1]; see Geometry.split_sums.
        raw: [P, H · W] float32, the saliency before it is scaled.
        saliency: [P, H · W] float32, in [0, 1].
    """

    targets: T
    labels: T
    quality: T
    sums: T
    raw: T
    saliency: T


@dataclass(frozen=True)
class Workspace(ArrayGroup[T]):
    """Tables, and what only the kernels and the classifier read.

    Attributes:
        table: [L, 8] int64; see Geometry.table.
        low: [L, H + W] int32; see Geometry.interpolation.
        share: [L, H + W] float32; see Geometry.interpolation.
        slopes: [P] float32, by which what the gradient graph gives for a pair is multiplied.
        psi: [P, C, 4] float32, the channel statistics ψ.
        scaled_psi: [P, C, 4] float32, ψ at equal deviations.
        exact: [EXACT_ROWS, P · C] float64; see `hierarchy`.
        coarse: [COARSE_ROWS, P · C] float32; see `hierarchy`.
        links: [LINK_ROWS, P · C] int32; see `hierarchy`.
        scales: [P, L] float64, by which the coarse centroids are multiplied.
        alive: [P, L, n + 1] int32, the clusters before the n rounds of merging that use the whole
            grid, and after each; 0 after rounds that were not needed.
        stale: [P, L, n + 1] int32, how many of those had a nearest that was out of date.
        rounds: [P, L] int32, the rounds of merging.
        unscaled: [P, k_max · pixels] float64, the collection sums before they are scaled.
        finished: [P, L, k_max] int32, the tiles of a collection sum that are done.
        histograms: [n, DIGITS, BINS] int32, of the digits of each mask's values.
        selected: [n, DIGITS, 2] int32; see `masks.count_values`.
        masks: [n, H · W] float32 or float16, in [0, 1].
        owner_of_mask: [n] int64, the image that each mask is for.
        extremes: [P, MAP_PARTS, 2] float32, the least and the greatest value of a part of each map.
    """

    table: T
    low: T
    share: T
    slopes: T
    psi: T
    scaled_psi: T
    exact: T
    coarse: T
    links: T
    scales: T
    alive: T
    stale: T
    rounds: T
    unscaled: T
    finished: T
    histograms: T
    selected: T
    masks: T
    owner_of_mask: T
    extremes: T


@dataclass(frozen=True)
class Buffers(MaskCounts[T], MaskValues[T], PairValues[T], Workspace[T]):
    """All arrays of one slot, of the shapes that Geometry.specs gives."""

"""The typed groups of the kernels' arrays."""

from __future__ import annotations

from dataclasses import fields

import pytest

from ccam_deploy.kernels.cuda.buffers import (
    Buffers,
    MaskCounts,
    MaskValues,
    PairValues,
    Workspace,
)
from ccam_deploy.kernels.cuda.geometry import Geometry, LayerPlace


def test_a_group_takes_its_arrays_out_of_more() -> None:
    group = MaskCounts.of({"scores": 1, "starts": 2, "counts": 3})
    assert group == MaskCounts(counts=3, starts=2)
    assert group.by_name() == {"counts": 3, "starts": 2}
    with pytest.raises(KeyError, match="starts"):
        MaskCounts.of({"counts": 3})


def test_every_array_is_in_exactly_one_group() -> None:
    names = [
        field.name
        for group in (MaskCounts, MaskValues, PairValues, Workspace)
        for field in fields(group)
    ]
    assert sorted(names) == sorted(field.name for field in fields(Buffers))


def test_rows_of_results_are_pairs_or_masks() -> None:
    """A part of a batch is downloaded by its first rows."""
    geometry = Geometry((LayerPlace(4, 3, 2, 0, 0), LayerPlace(8, 2, 1, 24, 24)), (6, 5), 3, 7)
    arrays = geometry.specs().by_name()
    for spec in MaskValues.of(arrays).by_name().values():
        assert spec.shape == (3 * 2 * 7,)
    for spec in PairValues.of(arrays).by_name().values():
        assert spec.shape[0] == 3

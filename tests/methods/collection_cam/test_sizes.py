"""The few numbers of rows that engines are run with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccam_deploy.methods.collection_cam.sizes import image_sizes, mask_sizes, padded


def test_by_hand() -> None:
    assert image_sizes(1) == (1,)
    assert image_sizes(2) == (1, 2)
    assert image_sizes(16) == (1, 2, 4, 8, 16)
    assert image_sizes(20) == (1, 2, 4, 8, 16, 20)
    assert mask_sizes(64, single=True) == (4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64)
    assert mask_sizes(64, single=False) == (16, 32, 48, 64)
    assert mask_sizes(30, single=True) == (4, 8, 12, 16, 20, 24, 28, 30)
    assert mask_sizes(3, single=True) == mask_sizes(3, single=False) == (3,)
    assert [padded(rows, (4, 8, 10)) for rows in (1, 4, 5, 9, 10)] == [4, 4, 8, 10, 10]


@given(st.integers(1, 300), st.booleans())
def test_every_number_fits_one_and_little_is_wasted(most: int, single: bool) -> None:
    for sizes, waste in ((image_sizes(most), 2.0), (mask_sizes(most, single), 1.3)):
        assert list(sizes) == sorted(set(sizes))
        assert sizes[-1] == most
        for rows in range(1, most + 1):
            size = padded(rows, sizes)
            assert rows <= size
            assert size < waste * rows + (0 if waste == 2.0 else 4 if single else 16)


def test_more_rows_than_the_largest_size_are_a_mistake() -> None:
    with pytest.raises(IndexError):
        padded(9, (4, 8))

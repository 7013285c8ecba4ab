"""Pairs of images and classes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ccam_deploy.targets import first_occurrences


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4))))
def test_first_occurrences_are_those_of_numpy(pairs: list[tuple[int, int]]) -> None:
    owner, targets = np.array(pairs, np.int64).reshape(-1, 2).T
    _, first = np.unique(np.stack([owner, targets]), axis=1, return_index=True)
    kept = first_occurrences(owner, targets)
    assert kept.dtype == np.intp
    assert kept.tolist() == sorted(first.tolist())

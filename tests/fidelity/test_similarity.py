"""Spearman's correlation and SSIM against SciPy and scikit-image, top pixels by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import gaussian_filter
from scipy.stats import rankdata, spearmanr

from ccam_deploy.arrays import Floats
from ccam_deploy.fidelity.similarity import _average_ranks, spearman, ssim, top_overlap

metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")

UNIT = st.floats(0, 1, width=32)


def smooth(seed: int, height: int = 30, width: int = 41) -> Floats:
    """A map like a saliency map: soft, in [0, 1]."""
    values = np.random.default_rng(seed).random((height, width))
    soft = gaussian_filter(values, 3)
    scaled: Floats = ((soft - soft.min()) / np.ptp(soft)).astype(np.float32)
    return scaled


@pytest.mark.parametrize("seed", range(3))
def test_spearman_is_scipys(seed: int) -> None:
    one, other = smooth(seed), smooth(seed + 9)
    expected = spearmanr(one.ravel(), other.ravel()).statistic
    assert spearman(one, other) == pytest.approx(expected, abs=1e-12)


@given(
    st.lists(st.integers(0, 3), min_size=4, max_size=30),
    st.integers(0, 2**31),
)
def test_spearman_shares_ranks_among_equals(values: list[int], seed: int) -> None:
    one = np.array([0, 1, *values], np.float32)
    other = np.random.default_rng(seed).permutation(one)
    expected = spearmanr(one, other).statistic
    assert spearman(one, other) == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
@given(
    arrays(
        st.sampled_from([np.float32, np.float64]),
        st.tuples(st.integers(1, 8), st.integers(1, 30)),
        elements=st.floats(width=32) | st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0]),
    )
)
def test_ranks_are_scipys_to_the_bit(values: Floats) -> None:
    expected = rankdata(values.astype(np.float64).ravel())
    assert _average_ranks(values).tobytes() == expected.tobytes()


def test_ranks_of_a_map_are_scipys_to_the_bit() -> None:
    values = smooth(2, 224, 224).round(3)
    expected = rankdata(values.astype(np.float64).ravel())
    assert _average_ranks(values).tobytes() == expected.tobytes()


def test_spearman_by_hand() -> None:
    """Ranks 1234 and 1243: 1 − 6·(1 + 1) / (4·15) = 0.8."""
    one = np.array([[1, 2], [3, 4]], np.float32)
    assert spearman(one, np.array([[1, 2], [9, 4]], np.float32)) == pytest.approx(0.8)
    assert spearman(one, one**3) == pytest.approx(1)
    assert spearman(one, -one) == pytest.approx(-1)


def test_spearman_of_flat_maps() -> None:
    flat, varied = np.full((9, 9), 0.3, np.float32), smooth(0, 9, 9)
    assert spearman(flat, flat + 0.1) == 1
    assert spearman(flat, varied) == 0
    assert spearman(varied, flat) == 0


@pytest.mark.parametrize("size", [(30, 41), (7, 7), (8, 100)])
def test_ssim_is_scikit_images(size: tuple[int, int]) -> None:
    one, other = smooth(1, *size), smooth(2, *size)
    expected = metrics.structural_similarity(
        one.astype(np.float64), other.astype(np.float64), data_range=1
    )
    assert ssim(one, other) == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
@given(arrays(np.float32, (8, 9), elements=UNIT), arrays(np.float32, (8, 9), elements=UNIT))
def test_ssim_is_scikit_images_on_any_map(first: Floats, second: Floats) -> None:
    expected = metrics.structural_similarity(
        first.astype(np.float64), second.astype(np.float64), data_range=1
    )
    assert ssim(first, second) == pytest.approx(expected, abs=1e-9)


def test_ssim_falls_with_the_difference() -> None:
    one, other = smooth(3), smooth(4)
    values = [ssim(one, one + share * (other - one)) for share in (0, 0.01, 0.1, 0.5, 1)]
    assert values[0] == pytest.approx(1, abs=1e-12)
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.7


def test_ssim_needs_its_window() -> None:
    small = np.zeros((6, 20), np.float32)
    with pytest.raises(ValueError, match=r"maps of \(6, 20\) are smaller than the 7x7 window"):
        ssim(small, small)


def row(*values: float) -> Floats:
    return np.array([values], np.float32)


@pytest.mark.parametrize(
    ("first", "second", "share"),
    [
        # Ten pixels: the highest one.
        (row(1, 9, 2, 3, 4, 5, 6, 7, 8, 0), row(0, 1, 0, 0, 0, 0, 0, 0, 0, 0), 1),
        (row(1, 9, 2, 3, 4, 5, 6, 7, 8, 0), row(1, 0, 0, 0, 0, 0, 0, 0, 0, 0), 0),
        # Eleven: a tenth is rounded up to two. Places 1 and 8 against places 1 and 7.
        (row(1, 9, 2, 3, 4, 5, 6, 7, 8, 0, 0), row(0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0), 1 / 2),
        # One place for two equal pixels: each has half of it, and meets a pixel that has all.
        (row(7, 7, 2, 3, 4, 5, 6, 1, 1, 0), row(9, 1, 0, 0, 0, 0, 0, 0, 0, 0), 1 / 2),
        # Half of place 0 and half of 1 against thirds of 1, 2 and 3: a third is common.
        (row(7, 7, 2, 3, 4, 5, 6, 1, 1, 0), row(0, 9, 9, 9, 0, 0, 0, 0, 0, 0), 1 / 3),
        # Two places of eleven: place 0, and thirds of 1, 2 and 3, against places 0 and 3.
        (row(9, 8, 8, 8, 0, 0, 0, 0, 0, 0, 0), row(9, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0), 4 / 3 / 2),
    ],
)
def test_top_overlap_by_hand(first: Floats, second: Floats, share: float) -> None:
    assert top_overlap(first, second) == pytest.approx(share)
    assert top_overlap(second, first) == pytest.approx(share)


def test_top_overlap_of_flat_maps() -> None:
    flat, varied = np.full((10, 30), 0.3, np.float32), smooth(0, 10, 30)
    assert top_overlap(flat, flat - 0.3) == pytest.approx(1)
    assert top_overlap(flat, varied) == pytest.approx(0.1)


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_top_overlap_is_that_of_sets(tens: int, seed: int) -> None:
    """Without ties, it is what two sets of places have in common."""
    stream = np.random.default_rng(seed)
    one, other = (stream.permutation(10 * tens).astype(np.float32) for _ in range(2))
    sets = [set(np.flatnonzero(values >= 9 * tens).tolist()) for values in (one, other)]
    assert top_overlap(one, other) == pytest.approx(len(sets[0] & sets[1]) / tens)
    assert top_overlap(one, one**3) == pytest.approx(1)


def test_what_is_not_a_number_stays_so() -> None:
    broken = smooth(5)
    broken[3, 3] = np.nan
    assert np.isnan(spearman(broken, smooth(5)))
    assert np.isnan(ssim(smooth(5), broken))
    assert np.isnan(top_overlap(smooth(5), broken))
    assert np.isnan(top_overlap(broken, broken))

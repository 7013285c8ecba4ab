"""The CPU kernels against the paper's equations, NumPy, SciPy and PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.cluster.hierarchy import fcluster, linkage

from ccam_deploy.kernels import cpu
from tests.helpers import noise, ratio_by_definition, ward_by_definition

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
ANY = st.floats(allow_nan=False, allow_infinity=False, width=32)


def groups(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == value).tolist()) for value in np.unique(labels)}


def test_statistics_by_hand() -> None:
    features = np.array([[[[1, 3], [5, 7]], [[2, 2], [2, 2]]]], np.float32)
    gradients = np.array([[[[0, 0], [0, 4]], [[-1, 1], [-1, 1]]]], np.float32)
    psi = cpu.channel_statistics(features, gradients)
    expected = [[[4, np.sqrt(5), 1, np.sqrt(3)], [2, 0, 0, 1]]]
    np.testing.assert_allclose(psi, expected, rtol=1e-6)
    assert psi.dtype == np.float32


def test_statistics_match_pytorch() -> None:
    features, gradients = noise(2, 7, 9, 5), noise(2, 7, 9, 5, seed=1)
    psi = cpu.channel_statistics(features, gradients)
    a, g = torch.from_numpy(features).double(), torch.from_numpy(gradients).double()
    expected = torch.stack(
        [a.mean((2, 3)), a.std((2, 3), False), g.mean((2, 3)), g.std((2, 3), False)], -1
    )
    np.testing.assert_allclose(psi, expected.numpy(), rtol=1e-6)


def test_statistics_do_not_overflow() -> None:
    huge = np.full((1, 1, 4, 4), 3e38, np.float32)
    psi = cpu.channel_statistics(huge, -huge)
    np.testing.assert_allclose(psi[0, 0], [3e38, 0, -3e38, 0], rtol=1e-6)


def test_ratio_by_hand() -> None:
    """Two pairs on a line: DIC = 0.25, SIC = 100 for both collections."""
    psi = np.zeros((4, 4), np.float32)
    psi[:, 0] = [0, 1, 10, 11]
    labels = np.array([0, 0, 1, 1], np.int32)
    assert cpu.dispersion_separation_ratio(psi, labels) == pytest.approx(99.75 / 100.25)


def test_ratio_of_singletons_is_one() -> None:
    psi = noise(5, 4)
    assert cpu.dispersion_separation_ratio(psi, np.arange(5, dtype=np.int32)) == 1


def test_ratio_needs_two_collections() -> None:
    with pytest.raises(ValueError, match="two collections"):
        cpu.dispersion_separation_ratio(noise(3, 4), np.zeros(3, np.int32))


@given(st.integers(2, 5), st.integers(0, 2**31))
def test_ratio_by_definition(count: int, seed: int) -> None:
    stream = np.random.default_rng(seed)
    psi = stream.standard_normal((12, 4))
    labels = np.concatenate([np.arange(count), stream.integers(0, count, 12 - count)])
    labels = labels.astype(np.int32)
    members = [np.flatnonzero(labels == value).tolist() for value in range(count)]
    expected = ratio_by_definition(psi, members)
    assert cpu.dispersion_separation_ratio(psi, labels) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=40)
@given(st.integers(2, 14), st.integers(0, 2**31))
def test_partition_by_definition(channels: int, seed: int) -> None:
    """The chosen partition is the best of the hierarchy that eq. 10 and 11 give."""
    psi = np.random.default_rng(seed).standard_normal((channels, 4)).astype(np.float32)
    result = cpu.partition(psi, 2, 6)
    wide = psi.astype(np.float64)
    best = -np.inf
    for candidate in reversed(ward_by_definition(wide)):
        if 2 <= len(candidate) <= 6:
            ratio = ratio_by_definition(wide, candidate)
            assert result.quality[len(candidate) - 2] == pytest.approx(ratio, rel=1e-5, abs=1e-6)
            if ratio > best + 1e-12:
                best, chosen = ratio, candidate
    assert groups(result.labels) == {frozenset(members) for members in chosen}
    assert result.count == len(chosen)


@pytest.mark.slow
@given(st.integers(3, 60), st.integers(2, 10), st.integers(0, 2**31))
def test_every_cut_matches_scipy(channels: int, count: int, seed: int) -> None:
    psi = np.random.default_rng(seed).standard_normal((channels, 4)).astype(np.float32)
    result = cpu.partition(psi, count, count)
    tree = linkage(psi.astype(np.float64), "ward")
    assert groups(result.labels) == groups(fcluster(tree, count, "maxclust"))


def test_labels_are_numbered_by_first_channel() -> None:
    psi = np.zeros((5, 4), np.float32)
    psi[:, 0] = [9, 0, 9, 0, 5]
    assert cpu.partition(psi, 3, 3).labels.tolist() == [0, 1, 0, 1, 2]


def test_smaller_number_wins_among_equals() -> None:
    """Distinct points that lie on each other leave ratio 1 for several numbers."""
    psi = np.zeros((6, 4), np.float32)
    psi[:, 1] = [0, 0, 0, 8, 8, 8]
    result = cpu.partition(psi, 2, 5)
    assert result.count == 2
    assert result.quality.tolist() == [1, -1, -1, -1]


@pytest.mark.parametrize("channels", [1, 2, 3, 512])
def test_identical_channels_are_one_collection(channels: int) -> None:
    result = cpu.partition(np.ones((channels, 4), np.float32), 2, 10)
    assert result.count == 1
    assert not result.labels.any()


def test_one_and_two_channels() -> None:
    assert cpu.partition(noise(1, 4), 2, 10).count == 1
    two = cpu.partition(noise(2, 4), 2, 10)
    assert (two.count, two.labels.tolist()) == (2, [0, 1])


def test_one_collection_can_be_asked_for() -> None:
    assert cpu.partition(noise(8, 4), 1, 1).count == 1


@pytest.mark.slow
@given(arrays(np.float32, st.tuples(st.integers(1, 12), st.just(4)), elements=ANY))
def test_partition_is_sound_for_finite_input(psi: np.ndarray) -> None:
    result = cpu.partition(psi, 2, 4)
    assert np.isfinite(result.quality).all()
    assert set(result.labels) == set(range(result.count))
    assert result.count <= max(1, min(4, len(np.unique(psi, axis=0))))


def test_standardise_scales_each_statistic() -> None:
    psi = noise(2, 30, 4) * np.array([1, 10, 100, 0], np.float32) + 5
    scaled = cpu.standardise(psi)
    np.testing.assert_allclose(scaled[..., :3].std(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(scaled.mean(axis=1), 0, atol=1e-5)
    assert not scaled[..., 3].any()


def test_shallow_sums_by_hand() -> None:
    """Pixels with a positive gradient are added, negative sums cut, the maximum scaled to 1."""
    features = np.array([[[1, 2]], [[3, -9]], [[5, 6]]], np.float32)
    gradients = np.array([[[1, -1]], [[1, 1]], [[0, 2]]], np.float32)
    labels = np.array([0, 0, 1], np.int32)
    sums = cpu.collection_sums(features, gradients, labels, 2, final=False)
    np.testing.assert_array_equal(sums, [[[1, 0]], [[0, 1]]])


def test_a_gate_counts_small_gradients_in_proportion() -> None:
    """Half of the channel's largest counts in full, a tenth of it by a fifth, negatives never."""
    features = np.array([[[10, 10, 10, 10]], [[4, 4, 4, 4]]], np.float32)
    gradients = np.array([[[0.2, 1, -2, 0]], [[0, 0, 0, 0]]], np.float32)
    labels = np.array([0, 1], np.int32)
    sums = cpu.collection_sums(features, gradients, labels, 2, final=False, gate=0.5)
    expected = np.array([[[0.2, 1, 0, 0]], [[0, 0, 0, 0]]], np.float32)
    np.testing.assert_allclose(sums, expected, rtol=1e-6)
    final = cpu.collection_sums(features, gradients, labels, 2, final=True, gate=0.5)
    plain = cpu.collection_sums(features, gradients, labels, 2, final=True)
    np.testing.assert_array_equal(final, plain)


@pytest.mark.slow
@given(
    arrays(np.float32, (2, 3, 4), elements=st.floats(0, 9, width=32)),
    arrays(np.float32, (2, 3, 4), elements=st.floats(-1, 1, width=16)),
)
def test_a_vanishing_gate_is_the_papers(features: np.ndarray, gradients: np.ndarray) -> None:
    labels = np.array([0, 1], np.int32)
    plain = cpu.collection_sums(features, gradients, labels, 2, final=False)
    gated = cpu.collection_sums(features, gradients, labels, 2, final=False, gate=1e-9)
    np.testing.assert_allclose(gated, plain, rtol=1e-6)


def test_final_sums_by_hand() -> None:
    """Channels are weighed by their mean gradient: 2·A_0 − 1·A_1 for the first collection."""
    features = np.array([[[4, 1]], [[2, 8]], [[5, 5]]], np.float32)
    gradients = np.array([[[3, 1]], [[0, -2]], [[1, 1]]], np.float32)
    labels = np.array([0, 0, 1], np.int32)
    sums = cpu.collection_sums(features, gradients, labels, 2, final=True)
    np.testing.assert_array_equal(sums, [[[1, 0]], [[0, 0]]])


@pytest.mark.parametrize(
    ("source", "target"),
    [((7, 7), (224, 224)), ((5, 3), (11, 20)), ((9, 9), (4, 6)), ((1, 2), (8, 8))],
)
def test_upsampling_matches_pytorch(source: tuple[int, int], target: tuple[int, int]) -> None:
    maps = noise(3, *source)
    expected = F.interpolate(torch.from_numpy(maps)[None], target, mode="bilinear")[0]
    np.testing.assert_allclose(cpu.upsample(maps, target), expected.numpy(), atol=2e-6)


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 40)),
        elements=st.floats(0, 9, width=32),
    ),
    st.floats(0, 0.999),
)
def test_quantile_matches_numpy(values: np.ndarray, fraction: float) -> None:
    expected = np.percentile(values.astype(np.float64), 100 * fraction, axis=1)
    np.testing.assert_allclose(cpu.quantile(values, fraction), expected, rtol=1e-5, atol=1e-6)


def test_quantile_of_mostly_zeros_is_zero() -> None:
    values = np.zeros((1, 1000), np.float32)
    values[0, :500] = 1
    assert cpu.quantile(values, 0.4) == 0
    assert cpu.quantile(values, 0.6) == 1


def test_masks_by_hand() -> None:
    """At the layer's own size nothing is interpolated: quantile, strict comparison, scaling."""
    sums = np.array([[[0.2, 0.4, 0.6, 0.8, 1.0]]], np.float32)
    masks, flat = cpu.render_masks(sums, (1, 5), 0.25)
    np.testing.assert_allclose(masks[0, 0], [0, 0, 0.6, 0.8, 1.0], rtol=1e-6)
    assert not flat.any()


@pytest.mark.parametrize("level", [0.0, 0.7])
def test_flat_masks_become_zeros(level: float) -> None:
    masks, flat = cpu.render_masks(np.full((1, 1, 1), level, np.float32), (6, 6), 0.1)
    assert flat.all()
    assert not masks.any()


def test_constant_collections_are_flat() -> None:
    features = np.full((2, 3, 3), 0.1, np.float32)
    sums = cpu.collection_sums(features, features, np.zeros(2, np.int32), 1, final=False)
    assert cpu.render_masks(sums, (50, 50), 0.0)[1].all()


@settings(max_examples=60)
@given(
    arrays(np.float32, (3, 4, 5), elements=ANY),
    arrays(np.float32, (3, 4, 5), elements=ANY),
    st.sampled_from([0.0, 0.1, 0.9]),
    st.booleans(),
)
def test_masks_are_sound_for_finite_input(
    features: np.ndarray, gradients: np.ndarray, theta: float, final: bool
) -> None:
    labels = np.array([0, 1, 0], np.int32)
    sums = cpu.collection_sums(features, gradients, labels, 2, final)
    masks, flat = cpu.render_masks(sums, (12, 9), theta)
    assert np.isfinite(masks).all()
    assert masks.min() >= 0
    np.testing.assert_allclose(masks.max(axis=(1, 2)), np.where(flat, 0, 1), rtol=1e-6)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**31))
def test_softmax_sum_does_not_depend_on_chunks(count: int, chunk: int, seed: int) -> None:
    stream = np.random.default_rng(seed)
    masks = stream.random((count, 4, 3), dtype=np.float32)
    scores = (stream.standard_normal(count) * 30).astype(np.float32)
    weighted = cpu.SoftmaxSum(1, (4, 3))
    for start in range(0, count, chunk):
        weighted.add(0, scores[start : start + chunk], masks[start : start + chunk])
    alpha = torch.from_numpy(scores).double().softmax(0).numpy()
    expected = np.einsum("n,nij->ij", alpha, masks)
    np.testing.assert_allclose(weighted.result()[0], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        cpu.softmax(scores, np.ones(count, bool)), alpha, rtol=1e-5, atol=1e-7
    )


def test_masks_that_do_not_count_get_no_weight() -> None:
    scores = np.array([1, 100, 1], np.float32)
    assert cpu.softmax(scores, np.array([True, False, True])).tolist() == [0.5, 0, 0.5]
    assert not cpu.softmax(scores, np.zeros(3, bool)).any()


def test_no_mask_gives_an_empty_map() -> None:
    assert not cpu.SoftmaxSum(2, (3, 3)).result().any()


@given(arrays(np.float32, (2, 3, 4), elements=FINITE))
def test_min_max_is_in_the_unit_interval(maps: np.ndarray) -> None:
    scaled = cpu.min_max(maps)
    assert np.isfinite(scaled).all()
    assert scaled.min() >= 0
    assert scaled.max() <= 1

"""Ward's hierarchy and its cut, on Numba's simulator and on a GPU where there is one.

They are compared with the CPU kernels, to the last channel.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("numba.cuda")

from ccam_deploy.arrays import Floats
from ccam_deploy.kernels import cpu
from tests.kernels.simulated_device import Arrays, Device, Run, split

pytestmark = pytest.mark.slow

SEEDS = st.integers(0, 2**31)
FEW = settings(max_examples=4, phases=[Phase.explicit, Phase.reuse, Phase.generate])


def partition_run(layers: list[Floats], **options: int) -> Run:
    """Statistics [P, C, 4] of several layers, as one launch of the partition."""
    pairs = len(layers[0])
    shapes = tuple((psi.shape[1], 1, 1) for psi in layers)
    given = {"psi": np.concatenate(layers, axis=1)}
    return Run(shapes, ("partition",), (0,) * pairs, given=given, **options)  # type: ignore[arg-type]


def assert_partitions_match(run: Run, out: Arrays) -> None:
    psi_of = split(run, run.given["psi"])
    for layer, (psi, labels) in enumerate(zip(psi_of, split(run, out["labels"]), strict=True)):
        for pair in range(len(run.owner)):
            wanted = cpu.partition(psi[pair].astype(np.float32), run.k_min, run.k_max)
            assert labels[pair].tolist() == wanted.labels.tolist()
            assert out["counts"][pair, layer] == wanted.count
            np.testing.assert_allclose(
                out["quality"][pair, layer], wanted.quality, rtol=1e-5, atol=1e-6
            )
            assert out["rounds"][pair, layer] <= 2 * max(psi.shape[1] - 1, 0)


def test_standardised_partition_matches_cpu(device: Device) -> None:
    psi = np.random.default_rng(3).standard_normal((1, 9, 4)) * [1, 10, 100, 0] + 5
    run = partition_run([psi.astype(np.float32)])
    out = device(Run(**{**vars(run), "standardise": True, "threads": 32}))
    wanted = cpu.standardise(run.given["psi"])
    np.testing.assert_allclose(out["scaled_psi"][:1], wanted, rtol=1e-5, atol=1e-6)
    assert out["labels"][0].tolist() == cpu.partition(wanted[0], 2, 4).labels.tolist()


@FEW
@given(st.lists(st.integers(1, 14), min_size=1, max_size=3), st.integers(1, 5), SEEDS)
def test_partition_matches_cpu(device: Device, channels: list[int], k_max: int, seed: int) -> None:
    stream = np.random.default_rng(seed)
    layers = [stream.standard_normal((2, c, 4)).astype(np.float32) for c in channels]
    run = partition_run(layers, k_min=min(2, k_max), k_max=k_max, threads=32)
    assert_partitions_match(run, device(run))


def test_buffers_may_have_room_for_more_collections(device: Device) -> None:
    """The numbers to try lie in device memory; all that is computed is the same."""
    layers = [np.random.default_rng(c).standard_normal((2, c, 4)) for c in (9, 3, 1)]
    for k_min, k_max in ((1, 1), (2, 3), (4, 4)):
        run = partition_run(
            [psi.astype(np.float32) for psi in layers], k_min=k_min, k_max=k_max, threads=32
        )
        exact, roomy = device(run), device(replace(run, room_for_k=7))
        assert_partitions_match(run, roomy)
        for name in ("labels", "counts", "quality", "rounds"):
            np.testing.assert_array_equal(roomy[name][:2], exact[name][:2])


def hard_layers() -> list[Floats]:
    """Ties that leave every ratio the same, and statistics that float32 cannot tell apart."""
    stream = np.random.default_rng(11)
    corners = np.array([[x, y, 0, 0] for x in (0, 1) for y in (0, 1)])
    squares = np.concatenate([side * corners + 20 * side**2 for side in (1, 2, 3)])
    dead = stream.standard_normal((24, 4)) * (np.arange(24) % 3 == 0)[:, None]
    gradients_only = stream.standard_normal((12, 4)) * [0, 0, 1e-7, 1e-7] + [[1, 0, 0, 0]]
    offset = (1e3 + stream.standard_normal((16, 4)) / 256).astype(np.float32)
    huge = stream.standard_normal((10, 4)) * 1e38
    tiny = stream.standard_normal((10, 4)) * 1e-39
    wide = np.concatenate([huge, tiny, stream.standard_normal((4, 4))])
    chain = np.zeros((30, 4))
    chain[:, 1] = 3.0 ** np.arange(30)
    cases = [squares, dead, gradients_only, offset, huge, tiny, wide, chain, chain[::-1]]
    return [case[None].astype(np.float32) for case in cases]


def test_hard_partitions_match_cpu(device: Device) -> None:
    run = partition_run(hard_layers())
    assert_partitions_match(run, device(run))


@pytest.mark.parametrize(
    ("block_clusters", "threads"), [pytest.param(4, 64, marks=pytest.mark.nightly), (12, 64)]
)
def test_rounds_of_the_grid_change_nothing(
    device: Device, block_clusters: int, threads: int
) -> None:
    """Few grid rounds, or enough for some layers only, or more than it takes: the same to the bit.

    A chain needs more rounds than are launched, and a layer of one or two channels none.
    """
    random = np.random.default_rng(2).standard_normal((1, 40, 4)).astype(np.float32)
    few = random[:, :2], random[:, :1], np.ones_like(random[:, :16])
    layers = [*hard_layers()[:4], hard_layers()[-1], random, *few]
    one_block = partition_run(layers)
    shared_out = replace(one_block, block_clusters=block_clusters, threads=threads)
    assert shared_out.geometry().grid_rounds == {4: 11, 12: 6}[block_clusters]
    expected, out = device(one_block), device(shared_out)
    assert not expected["alive"][:1, :, 1:].any()
    assert out["alive"][:1, :, 1:].any()
    for name in ("labels", "counts", "quality", "rounds"):
        np.testing.assert_array_equal(out[name][:1], expected[name][:1])


@pytest.mark.nightly
def test_a_block_takes_over_in_the_middle_of_a_large_layer(device: Device) -> None:
    """As on a card: more channels than shared memory holds, and not enough rounds of the grid."""
    psi = np.random.default_rng(5).standard_normal((1, 600, 4)).astype(np.float32)
    run = partition_run([psi, psi[:, ::2]], threads=256)
    assert run.geometry().grid_rounds == 4
    assert_partitions_match(run, device(run))


@pytest.mark.parametrize("threads", [32, 64])
def test_identical_channels_take_logarithmic_rounds(device: Device, threads: int) -> None:
    """2^n identical channels pair up in n rounds; they are one collection."""
    identical, single = np.ones((1, 64, 4), np.float32), np.ones((1, 1, 4), np.float32)
    run = partition_run([identical, single], threads=threads)
    out = device(run)
    assert_partitions_match(run, out)
    assert out["rounds"][0].tolist() == [6, 0]


def test_chain_takes_a_round_per_merge(device: Device) -> None:
    """The worst case: only one pair at a time is each other's nearest."""
    chain = np.zeros((1, 20, 4), np.float32)
    chain[0, :, 0] = 3.0 ** np.arange(20)
    run = partition_run([chain], threads=32)
    assert device(run)["rounds"][0, 0] == 19


def test_equal_distances_end_in_a_sound_partition(device: Device) -> None:
    """Many partitions are right here; the rounds are bounded, and each ratio that of its cut."""
    line, plane = np.zeros((1, 24, 4), np.float32), np.zeros((1, 25, 4), np.float32)
    line[0, :, 2] = np.arange(24)
    plane[0, :, 0], plane[0, :, 1] = np.arange(25) % 5, np.arange(25) // 5
    run = partition_run([line, plane], k_max=4, threads=32)
    out = device(run)
    assert device(run)["labels"].tolist() == out["labels"].tolist()
    for layer, (psi, labels) in enumerate(
        zip((line, plane), split(run, out["labels"]), strict=True)
    ):
        count = out["counts"][0, layer]
        own = labels[0].astype(np.int32)
        assert sorted(set(own.tolist())) == list(range(count))
        quality = cpu.dispersion_separation_ratio(psi[0], own)
        assert out["quality"][0, layer, count - 2] == pytest.approx(quality, rel=1e-5)
        assert out["quality"][0, layer].max() == out["quality"][0, layer, count - 2]
        assert out["rounds"][0, layer] <= 2 * (psi.shape[1] - 1)


def test_statistics_that_are_not_finite_are_told(device: Device) -> None:
    """A layer with an infinite or undefined statistic gets no collection; the others do."""
    psi = np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)
    psi[0, 3, 1], psi[1, 5, 2] = np.inf, np.nan
    fine = psi[:, :3].copy()
    fine[0] = psi[1, :3]
    out = device(partition_run([psi, fine], threads=32))
    assert out["counts"][:2, 0].tolist() == [0, 0]
    assert (out["counts"][:2, 1] > 0).all()
    assert (out["quality"][:2, 0] == -1).all()

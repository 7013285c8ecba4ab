"""The CUDA kernels, on Numba's simulator and on a GPU where there is one, against the CPU kernels.

The simulator interprets every thread of every block: shapes are tiny, and many
cases share a launch, as layers and pairs of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special

pytest.importorskip("numba.cuda")

from ccam_deploy.arrays import Floats
from ccam_deploy.kernels import cpu
from tests.kernels.simulated_device import (
    Arrays,
    Run,
    simulate,
    simulate_cast,
    simulate_gather,
    simulator,
)

pytestmark = pytest.mark.slow

Result = TypeVar("Result")
SEEDS = st.integers(0, 2**31)
FEW = settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])


class Device:
    """Runs kernels in the simulator's process, or, without one, on the GPU."""

    def __init__(self, pool: Executor | None) -> None:
        self.pool = pool

    def __call__(self, run: Run) -> Arrays:
        return self._call(simulate, run)

    def cast(self, values: Floats, dtype: str, threads: int) -> NDArray[np.generic]:
        return self._call(simulate_cast, values, dtype, threads)

    def gather(self, values: NDArray[Any], owner: tuple[int, ...], threads: int) -> NDArray[Any]:
        return self._call(simulate_gather, values, owner, threads)

    def _call(self, function: Callable[..., Result], *arguments: object) -> Result:
        if self.pool is None:
            return function(*arguments)
        return self.pool.submit(function, *arguments).result()


@pytest.fixture(scope="module")
def simulated() -> Iterator[Device]:
    with simulator() as pool:
        yield Device(pool)


@pytest.fixture(scope="module", params=["simulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    """The simulator; and the GPU, where there is one."""
    if request.param == "gpu":
        return Device(None)
    chosen: Device = request.getfixturevalue("simulated")
    return chosen


def split(run: Run, values: NDArray[np.generic]) -> list[NDArray[np.generic]]:
    """Each layer's part of an array whose second axis is all layers' channels."""
    ends = np.cumsum([channels for channels, _, _ in run.shapes])
    return np.split(values[: len(run.owner)], ends[:-1], axis=1)


def maps_of(run: Run, sums: Floats, counts: NDArray[np.int32], pair: int) -> list[Floats]:
    """Each layer's collection sums [count, h, w] of one pair."""
    found, start = [], 0
    for (_, height, width), count in zip(run.shapes, counts[pair], strict=True):
        size = height * width
        found.append(sums[pair, start : start + count * size].reshape(count, height, width))
        start += run.k_max * size
    return found


def assert_masks_match(
    masks: Floats, flat: NDArray[np.uint8], sums: Floats, run: Run, tolerance: float
) -> float:
    """Equal but for pixels so near the threshold that rounding decides whether they are kept.

    Returns the share of pixels that were compared.
    """
    wanted, wanted_flat = cpu.render_masks(sums, run.size, run.theta)
    values = cpu.upsample(sums, run.size)
    threshold = cpu.quantile(values.reshape(len(values), -1), run.theta)[:, None, None]
    certain = (np.abs(values - threshold) > 1e-6) | (values == 0)
    # Rounding decides of a whole mask where it does of each pixel that may be kept.
    decided = certain.all(axis=(1, 2)) | (certain & (values > threshold)).any(axis=(1, 2))
    np.testing.assert_array_equal(flat[decided], wanted_flat[decided])
    found = masks.reshape(wanted.shape).astype(np.float32)
    np.testing.assert_allclose(found[certain], wanted[certain], atol=tolerance)
    return float(certain.mean())


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


@pytest.mark.parametrize(("dtype", "threads"), [("float32", 32), ("float16", 64)])
def test_pipeline_matches_cpu(device: Device, dtype: str, threads: int) -> None:
    """Every stage, on two layers and two pairs that share no image order."""
    stream = np.random.default_rng(7)
    shapes, owner, scale = ((5, 6, 7), (8, 3, 2)), (1, 0), 1024.0
    features = tuple(stream.standard_normal((2, *s)).astype(dtype) for s in shapes)
    gradients = tuple((stream.standard_normal((2, *s)) * scale).astype(dtype) for s in shapes)
    stages = "statistics", "partition", "sums", "masks"
    run = Run(shapes, stages, owner, features, gradients, gradient_scale=scale)
    run = Run(**{**vars(run), "size": (9, 40), "mask_dtype": dtype, "threads": threads})
    out = device(run)
    layers = [
        (a[list(owner)].astype(np.float32), g.astype(np.float32) / np.float32(scale))
        for a, g in zip(features, gradients, strict=True)
    ]
    place = 0
    for pair in range(2):
        maps = maps_of(run, out["sums"], out["counts"], pair)
        for layer, (a, g) in enumerate(layers):
            psi = cpu.channel_statistics(a, g)[pair]
            np.testing.assert_allclose(split(run, out["psi"])[layer][pair], psi, rtol=1e-5)
            part = cpu.partition(psi, run.k_min, run.k_max)
            assert split(run, out["labels"])[layer][pair].tolist() == part.labels.tolist()
            sums = cpu.collection_sums(a[pair], g[pair], part.labels, part.count, layer == 1)
            np.testing.assert_allclose(maps[layer], sums, atol=1e-5)
            assert out["starts"][pair * 2 + layer] == place
            own = slice(place, place + part.count)
            tolerance = 1e-5 if dtype == "float32" else 5e-4
            compared = assert_masks_match(out["masks"][own], out["flat"][own], sums, run, tolerance)
            assert compared > 0.95
            assert (out["owner_of_mask"][own] == owner[pair]).all()
            place += part.count
    assert out["starts"][4] == place
    assert not out["finished"].any()


def test_statistics_do_not_overflow_or_cancel(device: Device) -> None:
    huge = np.full((1, 1, 3, 3), 3e38, np.float32)
    near = (1e4 + np.random.default_rng(0).standard_normal((1, 1, 3, 3)) / 64).astype(np.float32)
    features = np.concatenate([huge, near], axis=1)
    run = Run(((2, 3, 3),), ("statistics",), (0,), (features,), (-features,), threads=32)
    wanted = cpu.channel_statistics(features, -features)
    np.testing.assert_allclose(device(run)["psi"][:1], wanted, rtol=1e-5)


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


@pytest.mark.parametrize(("block_clusters", "threads"), [(4, 64), (12, 64)])
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
    assert shared_out.geometry().grid_rounds == {4: 9, 12: 5}[block_clusters]
    expected, out = device(one_block), device(shared_out)
    assert expected["merges"][:1].max() == 0
    assert out["merges"][:1].max() > 0
    for name in ("labels", "counts", "quality", "rounds"):
        np.testing.assert_array_equal(out[name][:1], expected[name][:1])


@pytest.mark.nightly
def test_a_block_takes_over_in_the_middle_of_a_large_layer(device: Device) -> None:
    """As on a card: more channels than shared memory holds, and not enough rounds of the grid."""
    psi = np.random.default_rng(5).standard_normal((1, 600, 4)).astype(np.float32)
    run = partition_run([psi, psi[:, ::2]], threads=256)
    assert run.geometry().grid_rounds == 3
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


def test_flat_sums_become_zeros(device: Device) -> None:
    """A constant map, one without a positive gradient, and one that is negative everywhere."""
    features = np.full((1, 3, 6, 7), 0.1, np.float32)
    features[0, 2] = -np.arange(42).reshape(6, 7)
    gradients = np.ones((1, 3, 6, 7), np.float32)
    gradients[0, 1] = -1
    given: Arrays = {"labels": np.array([[0, 1, 2] * 2]), "counts": np.array([[3, 3]])}
    given["psi"] = np.ones((1, 6, 4), np.float32)
    run = Run(((3, 6, 7),) * 2, ("sums", "masks"), (0,), (features,) * 2, (gradients,) * 2)
    out = device(Run(**{**vars(run), "given": given, "theta": 0.0}))
    for maps in maps_of(run, out["sums"], out["counts"], 0):
        assert not maps.any()
    assert out["flat"][:6].all()
    assert not out["masks"][:6].any()


@FEW
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 14), st.integers(1, 70)),
    st.sampled_from([0.0, 0.1, 0.37, 0.9, 0.999]),
    st.sampled_from([32, 64]),
    SEEDS,
)
def test_masks_match_cpu(
    device: Device,
    source: tuple[int, int],
    size: tuple[int, int],
    theta: float,
    threads: int,
    seed: int,
) -> None:
    """Up and down, with zeros, equal values, very small values and a map of zeros."""
    stream = np.random.default_rng(seed)
    maps = stream.random((4, *source), dtype=np.float32)
    maps[1] *= stream.random(source) < 0.3
    maps[2] = np.float32(10.0) ** -stream.integers(0, 38, source)
    maps[3] = 0
    given: Arrays = {"sums": maps.reshape(1, -1), "counts": np.array([[4]])}
    run = Run(((4, *source),), ("masks",), given=given, size=size, theta=theta, threads=threads)
    out = device(run)
    assert out["starts"][:2].tolist() == [0, 4]
    assert_masks_match(out["masks"][:4], out["flat"][:4], maps, run, 1e-5)


def test_masks_are_weighted_by_their_scores(device: Device) -> None:
    """Flat masks take no weight, scores may be large, and a pair without a mask is empty."""
    stream = np.random.default_rng(5)
    masks = stream.random((6, 12), dtype=np.float32)
    flat = np.array([0, 0, 1, 0, 1, 1], np.uint8)
    masks[flat == 1] = 0
    scores = np.array([300, 301.5, 900, 299, 5, 6], np.float32)
    given: Arrays = {"masks": masks, "flat": flat, "starts": np.array([0, 3, 4, 5, 6])}
    given["scores"] = scores
    run = Run(((4, 1, 1),) * 2, ("combine",), (0, 0), given=given, size=(3, 4))
    out = device(run)
    weighted = cpu.SoftmaxSum(2, (3, 4))
    counted = flat[:4] == 0
    weighted.add(0, scores[:4][counted], masks[:4][counted].reshape(-1, 3, 4))
    wanted = weighted.result()
    np.testing.assert_allclose(out["weights"][:4], cpu.softmax(scores[:4], counted), rtol=1e-5)
    assert not out["weights"][4:6].any()
    np.testing.assert_allclose(out["raw"][:2].reshape(2, 3, 4), wanted, atol=1e-5)
    np.testing.assert_allclose(out["saliency"][:2].reshape(2, 3, 4), cpu.min_max(wanted), atol=1e-5)


def classes_by_logit(logits: NDArray[np.generic]) -> NDArray[np.int64]:
    return np.argsort(-logits.astype(np.float32), axis=1, kind="stable")


SCORES: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "logit": lambda logits: logits,
    "softmax": lambda logits: special.softmax(logits, axis=1),
    "sigmoid": special.expit,
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_images_are_cast(device: Device, dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal(75).astype(np.float32)
    values[3] = 7e-8
    np.testing.assert_array_equal(device.cast(values, dtype, 32), values.astype(dtype))


@pytest.mark.parametrize(("dtype", "threads"), [("float32", 32), ("float16", 64)])
@pytest.mark.parametrize("scoring", SCORES)
def test_output_gradient_matches_numpy(
    device: Device, dtype: str, threads: int, scoring: str
) -> None:
    """Given classes and ranks, among equal, infinite and undefined logits."""
    logits = (np.random.default_rng(2).standard_normal((3, 70)) * 3).astype(dtype)
    logits[1] = np.repeat([5, 7, -1, 7, 7, 5, 0], 10)
    logits[2] -= 40
    owner, codes = (2, 0, 1, 1, 1, 0), (69, -1, -2, -32, -70, -3)
    run = Run(((4, 1, 1),), ("output_gradient",), owner, logits=logits, codes=codes)
    run = replace(run, gradient_scale=1024.0, scoring=scoring, threads=threads)
    out = device(run)
    ranked = classes_by_logit(logits)
    targets = [
        w if w >= 0 else ranked[image, -1 - w] for image, w in zip(owner, codes, strict=True)
    ]
    assert out["targets"][:6].tolist() == targets
    gradient = np.eye(70)[targets]
    p = SCORES[scoring](logits.astype(np.float64))[list(owner)]
    if scoring == "softmax":
        gradient = p[np.arange(6), targets][:, None] * (gradient - p)
    elif scoring == "sigmoid":
        gradient *= p * (1 - p)
    assert out["gradient"].dtype == dtype
    exact = 1e-5 if dtype == "float32" else 1e-3
    np.testing.assert_allclose(out["gradient"], 1024 * gradient, rtol=exact, atol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "uint64"])
def test_rows_of_the_pairs_images(device: Device, dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 200, (3, 70)).astype(dtype)
    owner = (2, 0, 0, 1, 2)
    np.testing.assert_array_equal(device.gather(values, owner, 32), values[list(owner)])


def test_undefined_logits_come_last(device: Device) -> None:
    """As NumPy sorts them; with nothing but those left, the class is 0."""
    logits = np.full((1, 40), np.nan, np.float32)
    logits[0, [5, 9, 33]] = [-np.inf, np.inf, 2]
    run = Run(((4, 1, 1),), ("output_gradient",), (0,) * 4, logits=logits, codes=(-1, -2, -3, -4))
    out = device(replace(run, threads=32))
    assert out["targets"][:4].tolist() == [*classes_by_logit(logits)[0, :3], 0]


@pytest.mark.parametrize(("dtype", "threads"), [("float32", 64), ("float16", 32)])
@pytest.mark.parametrize("scoring", SCORES)
def test_masks_get_the_score_of_their_pairs_class(
    device: Device, dtype: str, threads: int, scoring: str
) -> None:
    """From a batch that ends after the last mask."""
    logits = (np.random.default_rng(4).standard_normal((10, 40)) * 4 - 50).astype(dtype)
    targets, pairs = np.array([39, 0, 7]), np.array([0, 0, 0, 1, 1, 2, 2, 2])
    given: Arrays = {"targets": targets, "starts": np.array([0, 2, 3, 3, 5, 5, 8])}
    run = Run(((4, 1, 1),) * 2, ("scores",), (0, 1, 0), logits=logits, given=given)
    out = device(replace(run, scoring=scoring, threads=threads))
    values = SCORES[scoring](logits.astype(np.float64))
    wanted = values[np.arange(8), targets[pairs]]
    np.testing.assert_allclose(out["scores"][:8], wanted, rtol=1e-5)
    assert np.isnan(out["scores"][8:]).all()


def test_a_larger_batch_than_the_masks_reads_valid_owners(device: Device) -> None:
    given: Arrays = {"counts": np.array([[2, 0], [1, 3]])}
    given["sums"] = np.ones((2, 8), np.float32)
    out = device(Run(((4, 1, 1),) * 2, ("masks",), (1, 0), given=given, threads=32))
    assert out["owner_of_mask"].tolist() == [1, 1, 0, 0, 0, 0] + [0] * 18
    assert out["flat"][6:].all()


def test_failures_inside_a_kernel_are_told(simulated: Device) -> None:
    """The simulated device's own check."""
    given: Arrays = {"starts": np.array([0, 300])}
    with pytest.raises(IndexError):
        simulated(Run(((4, 1, 1),), ("combine",), given=given))

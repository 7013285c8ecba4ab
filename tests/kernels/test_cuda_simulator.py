"""The CUDA kernels, on Numba's simulator and on a GPU where there is one, against the CPU kernels.

The simulator interprets every thread of every block: shapes are tiny, and many
cases share a launch, as layers and pairs of one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special

pytest.importorskip("numba.cuda")

from ccam_deploy.arrays import Floats
from ccam_deploy.kernels import cpu
from tests.kernels.simulated_device import Arrays, Device, Run, split

pytestmark = pytest.mark.slow

SEEDS = st.integers(0, 2**31)
FEW = settings(max_examples=4, phases=[Phase.explicit, Phase.reuse, Phase.generate])


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


@pytest.mark.parametrize(("dtype", "threads"), [("float32", 32), ("float16", 64)])
def test_pipeline_matches_cpu(device: Device, dtype: str, threads: int) -> None:
    """Every stage, on two layers and two pairs that share no image order."""
    stream = np.random.default_rng(7)
    shapes, owner, scale = ((5, 6, 7), (8, 3, 2)), (1, 0), 1024.0
    features = tuple(stream.standard_normal((2, *s)).astype(dtype) for s in shapes)
    gradients = tuple((stream.standard_normal((2, *s)) * scale).astype(dtype) for s in shapes)
    stages = "statistics", "partition", "sums", "masks"
    run = Run(shapes, stages, owner, features, gradients, gradient_scale=scale)
    slopes = np.array([0.25, 3], np.float32)
    run = replace(run, size=(9, 40), mask_dtype=dtype, threads=threads, given={"slopes": slopes})
    out = device(run)
    factors = (slopes / np.float32(scale))[:, None, None, None]
    layers = [
        (a[list(owner)].astype(np.float32), g.astype(np.float32) * factors)
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
    st.sampled_from([1 << 13, 100]),
    SEEDS,
)
def test_masks_match_cpu(
    device: Device,
    source: tuple[int, int],
    size: tuple[int, int],
    theta: float,
    threads: int,
    block_pixels: int,
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
    out = device(replace(run, block_pixels=block_pixels))
    assert out["starts"][:2].tolist() == [0, 4]
    assert_masks_match(out["masks"][:4], out["flat"][:4], maps, run, 1e-5)


def test_masks_do_not_depend_on_how_they_are_shared_out(device: Device) -> None:
    """Nor on a batch before, of other masks."""
    sums = np.random.default_rng(8).random((4, 5, 6), dtype=np.float32)
    sums[1] *= sums[1] > 0.7
    given: Arrays = {"sums": sums.reshape(1, -1), "counts": np.array([[4]])}
    run = Run(((4, 5, 6),), ("masks",), given=given, size=(21, 50), theta=0.37, threads=32)
    expected = device(run)
    for change in ({"block_pixels": 150, "threads": 64}, {"stages": ("masks", "masks")}):
        out = device(replace(run, **change))
        for name in ("masks", "flat", "owner_of_mask"):
            np.testing.assert_array_equal(out[name][:4], expected[name][:4])


@pytest.mark.parametrize(("size", "threads"), [((3, 4), 64), ((9, 15), 32)])
def test_masks_are_weighted_by_their_scores(
    device: Device, size: tuple[int, int], threads: int
) -> None:
    """Flat masks take no weight, scores may be large, and a pair without a mask is empty."""
    stream = np.random.default_rng(5)
    masks = stream.random((6, size[0] * size[1]), dtype=np.float32)
    flat = np.array([0, 0, 1, 0, 1, 1], np.uint8)
    masks[flat == 1] = 0
    scores = np.array([300, 301.5, 900, 299, 5, 6], np.float32)
    given: Arrays = {"masks": masks, "flat": flat, "starts": np.array([0, 3, 4, 5, 6])}
    given["scores"] = scores
    run = Run(((4, 1, 1),) * 2, ("combine",), (0, 0), given=given, size=size, threads=threads)
    out = device(run)
    weighted = cpu.SoftmaxSum(2, size)
    counted = flat[:4] == 0
    weighted.add(0, scores[:4][counted], masks[:4][counted].reshape(-1, *size))
    wanted = weighted.result()
    np.testing.assert_allclose(out["weights"][:4], cpu.softmax(scores[:4], counted), rtol=1e-5)
    assert not out["weights"][4:6].any()
    np.testing.assert_allclose(out["raw"][:2].reshape(2, *size), wanted, atol=1e-5)
    np.testing.assert_allclose(
        out["saliency"][:2].reshape(2, *size), cpu.min_max(wanted), atol=1e-5
    )


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
    """Given classes and ranks, among equal logits, and with one that leaves others no share."""
    logits = (np.random.default_rng(2).standard_normal((3, 70)) * 3).astype(dtype)
    logits[0, 3] = 30
    logits[1] = np.repeat([5, 7, -1, 7, 7, 5, 0], 10)
    logits[2] -= 40
    owner, codes = (2, 0, 1, 1, 1, 0), (69, -1, -2, -32, -70, 3)
    run = Run(((4, 1, 1),), ("output_gradient",), owner, logits=logits, codes=codes)
    run = replace(run, gradient_scale=1024.0, scoring=scoring, threads=threads)
    out = device(run)
    ranked = classes_by_logit(logits)
    targets = [
        w if w >= 0 else ranked[image, -1 - w] for image, w in zip(owner, codes, strict=True)
    ]
    assert out["targets"][:6].tolist() == targets
    own, slopes = np.eye(70, dtype=np.bool_)[targets], np.ones(6)
    gradient = own.astype(np.float64)
    p = SCORES[scoring](logits.astype(np.float64))[list(owner)]
    if scoring == "softmax":
        others = np.where(own, 0, p)
        slopes = p[own] * others.sum(axis=1)
        gradient -= others / others.sum(axis=1, keepdims=True)
    elif scoring == "sigmoid":
        slopes = special.expit(own_logits := logits[list(owner)][own].astype(np.float64))
        slopes *= special.expit(-own_logits)
    assert out["gradient"].dtype == dtype
    exact = 1e-5 if dtype == "float32" else 1e-3
    np.testing.assert_allclose(out["slopes"][:6], slopes, rtol=1e-5)
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
    """From a batch that ends after the last mask; of undefined logits it is undefined."""
    logits = (np.random.default_rng(4).standard_normal((10, 40)) * 4 - 50).astype(dtype)
    targets, pairs = np.array([39, 0, 7]), np.array([0, 0, 0, 1, 1, 2, 2, 2])
    wanted = SCORES[scoring](logits.astype(np.float64))[np.arange(8), targets[pairs]]
    undefined = [1, 4, 6]
    wanted[undefined], logits[undefined, [3, 39, 7]] = np.nan, [np.inf, np.nan, -np.inf]
    given: Arrays = {"targets": targets, "starts": np.array([0, 2, 3, 3, 5, 5, 8])}
    run = Run(((4, 1, 1),) * 2, ("scores",), (0, 1, 0), logits=logits, given=given)
    out = device(replace(run, scoring=scoring, threads=threads))
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

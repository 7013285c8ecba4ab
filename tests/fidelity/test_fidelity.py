"""Comparing what graphs compute with what was recorded."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import ccam_deploy as ccam
from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.folder import Bundle, read_bundle
from ccam_deploy.bundle.manifest import GraphPrecision, Precision
from ccam_deploy.engines import Networks, open_networks
from ccam_deploy.errors import IntegrityError, OptionError
from ccam_deploy.explanation import Explanation
from ccam_deploy.fidelity.comparison import compare_observations, relative_error
from ccam_deploy.fidelity.observation import (
    Observation,
    checked_views,
    fixed_masks,
    load_observation,
    save_observation,
)
from ccam_deploy.fidelity.tolerance import RANDOM_TOLERANCE, TOLERANCE, Tolerance, broken_bounds
from ccam_deploy.fidelity.verification import verify_bundle
from tests.helpers import noise

LAYERS = ("low", "high")
FP32_TOLERANCE = TOLERANCE["fp32"]


def ramp(height: int = 8, width: int = 10) -> Floats:
    return np.linspace(0, 1, height * width, dtype=np.float32).reshape(height, width)


def observation(**changes: Any) -> Observation:
    """Three images, two layers, three classes."""
    made = Observation(
        images=noise(3, 3, 8, 10),
        targets=np.array([1, 2, 0], np.int64),
        logits=np.array([[3, 4, 0], [0, 0, 12], [0, 0, 0]], np.float32),
        masked_logits=noise(12, 3),
        features=(noise(3, 6, 4, 5), noise(3, 5, 2, 3)),
        gradients=(noise(3, 6, 4, 5, seed=1), noise(3, 5, 2, 3, seed=1)),
        labels=(np.array([[0, 0, 1, 1, 2, 2]] * 3, np.int32), np.zeros((3, 5), np.int32)),
        saliency=np.stack([ramp(), ramp().T.reshape(8, 10), ramp()]),
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return read_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def networks(bundle: Bundle) -> Iterator[Networks]:
    opened = open_networks(bundle)
    yield opened
    opened.close()


def test_an_observation_agrees_with_itself() -> None:
    report = compare_observations(observation(), observation())
    assert (report.logits, report.masked_logits) == (0, 0)
    assert (report.features, report.gradients) == ((0, 0), (0, 0))
    assert report.saliency_rank == pytest.approx(1)
    assert report.worst_saliency_rank == pytest.approx(1)
    assert report.saliency_similarity == pytest.approx(1)
    assert report.saliency_overlap == pytest.approx(1)
    assert (report.partitions, report.images) == (1, 3)
    assert broken_bounds(report, FP32_TOLERANCE, LAYERS) == []


def test_differences_by_hand() -> None:
    """‖logits‖ is 13, one value is off by 1.3; one of six partitions differs."""
    expected = observation()
    labels = expected.labels[0].copy()
    labels[1, 0] = 1
    got = observation(
        logits=expected.logits + np.array([[0, 0, 1.3]] + 2 * [[0, 0, 0]], np.float32),
        masked_logits=expected.masked_logits * np.float32(1.25),
        features=(expected.features[0], expected.features[1] * np.float32(0.5)),
        gradients=(-expected.gradients[0], expected.gradients[1]),
        labels=(labels, expected.labels[1]),
        saliency=1 - expected.saliency,
    )
    report = compare_observations(got, expected)
    assert report.logits == pytest.approx(0.1, rel=1e-6)
    assert report.masked_logits == pytest.approx(0.25, rel=1e-6)
    assert report.features == pytest.approx((0, 0.5), rel=1e-6)
    assert report.gradients == pytest.approx((2, 0), rel=1e-6)
    assert report.saliency_rank == pytest.approx(-1)
    assert report.saliency_similarity < 0.5
    assert report.saliency_overlap == 0
    assert report.partitions == pytest.approx(5 / 6)
    assert broken_bounds(report, Tolerance(logits=0.05, gradients=0.01), LAYERS) == [
        "logits 0.1 is above 0.05",
        "gradients of low 2 is above 0.01",
    ]


def test_one_odd_image_is_reported_and_no_failure() -> None:
    """Features, gradients and saliency are judged by the median image; the worst is recorded."""
    expected = observation()
    odd = {
        name: tuple(values.copy() for values in getattr(expected, name))
        for name in ("features", "gradients")
    }
    for values in (*odd["features"], *odd["gradients"]):
        values[2] *= -1
    saliency = expected.saliency.copy()
    saliency[2] = 1 - saliency[2]
    report = compare_observations(observation(**odd, saliency=saliency), expected)
    assert (report.features, report.gradients) == ((0, 0), (0, 0))
    assert report.saliency_rank == pytest.approx(1)
    assert report.worst_saliency_rank == pytest.approx(-1)
    assert report.worst_gradients == pytest.approx((2, 2), rel=1e-6)
    assert report.saliency_similarity == pytest.approx(1)
    assert isinstance(report.worst_saliency_similarity, float)
    assert report.worst_saliency_similarity < 0.5
    assert (report.saliency_overlap, report.worst_saliency_overlap) == (1, 0)
    assert broken_bounds(report, FP32_TOLERANCE, LAYERS) == []


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([3, 4], [3, 4], 0),
        ([3, 4.5], [3, 4], 0.1),
        ([0, 0], [3, 4], 1),
        ([0, 0], [0, 0], 0),
        ([1, 0], [0, 0], np.inf),
        ([np.nan, 4], [3, 4], np.inf),
        ([np.inf, 4], [3, 4], np.inf),
    ],
)
def test_relative_error_by_hand(actual: list[float], expected: list[float], error: float) -> None:
    values = np.array(actual, np.float32), np.array(expected, np.float32)
    assert relative_error(*values) == pytest.approx(error)


@pytest.mark.parametrize("field", ["logits", "masked_logits", "features", "gradients", "saliency"])
def test_what_is_not_finite_fails(field: str) -> None:
    """One NaN in the last image breaks its tolerance, whatever the other values are."""
    value = getattr(observation(), field)
    broken = value[0] if isinstance(value, tuple) else value
    broken[-1].flat[-1] = np.nan
    report = compare_observations(observation(**{field: value}), observation())
    phrases = broken_bounds(report, FP32_TOLERANCE, LAYERS)
    assert phrases
    assert all(phrase.startswith(field) for phrase in phrases)


def test_tolerance_is_met_at_its_bound() -> None:
    report = dataclasses.replace(
        compare_observations(observation(), observation()), logits=0.25, saliency_rank=0.5
    )
    assert broken_bounds(report, Tolerance(logits=0.25, saliency_rank=0.5), LAYERS) == []
    assert broken_bounds(report, Tolerance(logits=0.24, saliency_rank=0.51), LAYERS) == [
        "logits 0.25 is above 0.24",
        "saliency_rank 0.5 is below 0.51",
    ]


@pytest.mark.parametrize("tolerance", [*TOLERANCE.values(), *RANDOM_TOLERANCE.values()])
def test_every_bound_can_fail(tolerance: Tolerance) -> None:
    """Zeros in place of gradients have an error of 1, so that a bound above it checks nothing."""
    for quantity, bound in tolerance.bounds().items():
        assert 0 < bound < 1, quantity


def test_a_quantity_without_a_bound_is_not_checked_but_must_be_finite() -> None:
    report = compare_observations(observation(), observation())
    off = dataclasses.replace(report, gradients=(0.0, 50.0), saliency_rank=-1.0)
    assert broken_bounds(off, RANDOM_TOLERANCE["fp16"], LAYERS) == []
    broken = dataclasses.replace(report, gradients=(0.0, np.inf))
    assert broken_bounds(broken, RANDOM_TOLERANCE["fp16"], LAYERS) == [
        "gradients of high inf is not finite"
    ]


def test_bounds_are_replaced_by_name() -> None:
    tolerance = Tolerance(logits=0.1, head=0.2).with_bounds({"logits": 0.3, "features": 0.4})
    assert tolerance.bounds() == {"logits": 0.3, "features": 0.4, "head": 0.2}
    assert tolerance.without(["head", "logits"]).bounds() == {"features": 0.4}
    with pytest.raises(OptionError, match=r'tolerance "logit" is unknown; there are logits, .+'):
        tolerance.with_bounds({"logit": 0.1})


def test_a_bundle_with_bounds_that_cannot_fail_still_verifies(
    bundle: Bundle, networks: Networks
) -> None:
    """Exports of random weights recorded such bounds once."""
    entry = bundle.precision("fp32")
    bounds = {**entry.tolerance, "gradients": 10.0, "saliency_rank": -1.0, "saliency_overlap": 0.0}
    precisions: dict[GraphPrecision, Precision] = {
        "fp32": dataclasses.replace(entry, tolerance=bounds)
    }
    manifest = dataclasses.replace(bundle.manifest, precisions=precisions)
    _, phrases = verify_bundle(Bundle(bundle.folder, manifest), networks, "fp32")
    assert phrases == []


def test_fixed_masks_are_slopes_in_four_directions() -> None:
    masks = fixed_masks(3, 5)
    assert masks.shape == (4, 3, 5)
    assert masks.dtype == np.float32
    np.testing.assert_allclose(masks[0], [[0, 0.25, 0.5, 0.75, 1]] * 3)
    np.testing.assert_allclose(masks[2], np.repeat([[0], [0.5], [1]], 5, axis=1))
    np.testing.assert_allclose(masks[0] + masks[1], 1)
    np.testing.assert_allclose(masks[2] + masks[3], 1)


def test_saved_observation_comes_back(tmp_path: Path) -> None:
    """Maps come back as mean and deviation of each channel, all else as it was."""
    path, made = tmp_path / "reference.npz", observation()
    save_observation(path, made)
    read = load_observation(path)
    for name in ("images", "targets", "logits", "masked_logits", "saliency"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name))
        assert getattr(read, name).dtype == getattr(made, name).dtype
    for index in range(2):
        np.testing.assert_array_equal(read.labels[index], made.labels[index])
        for got, maps in ((read.features, made.features), (read.gradients, made.gradients)):
            flat = maps[index].reshape(*maps[index].shape[:2], -1)
            expected = np.stack([flat.mean(-1), flat.std(-1)], -1)
            np.testing.assert_allclose(got[index], expected, rtol=1e-5, atol=1e-6)


def test_views_are_made_again_from_the_images(tmp_path: Path) -> None:
    path, given = tmp_path / "reference.npz", noise(2, 3, 8, 10)
    views = checked_views(given)
    made = observation(images=views, targets=np.arange(8, dtype=np.int64))
    made = dataclasses.replace(made, features=(noise(8, 6, 4, 5),), gradients=(noise(8, 6, 4, 5),))
    save_observation(path, made, 2)
    with np.load(path) as stored:
        np.testing.assert_array_equal(stored["images"], given)
        values = dict(stored)
    np.testing.assert_array_equal(load_observation(path).images, views)
    np.savez_compressed(path, **{**values, "targets": np.zeros(17, np.int64)})
    with pytest.raises(IntegrityError, match="it has 16 images for 17 targets"):
        load_observation(path)


def other_file(folder: Path, name: str) -> Path:
    path = folder / name
    save_observation(folder / "good.npz", observation())
    whole = (folder / "good.npz").read_bytes()
    content = {"empty": b"", "text": b"rubbish", "truncated": whole[: len(whole) // 2]}
    if name in content:
        path.write_bytes(content[name])
    elif name == "array.npy":
        np.save(path, noise(3))
    elif name == "pickle.npz":
        np.savez(path, images=np.array([{}], object))
    elif name == "partial.npz":
        np.savez(path, images=noise(3))
    return path


@pytest.mark.parametrize(
    "name", ["empty", "text", "truncated", "array.npy", "pickle.npz", "partial.npz", "missing"]
)
def test_another_file_is_refused(tmp_path: Path, name: str) -> None:
    path = other_file(tmp_path, name)
    with pytest.raises(IntegrityError, match=rf"{name} is no record of an export: .+"):
        load_observation(path)


def test_bundle_computes_what_was_recorded(bundle: Bundle, networks: Networks) -> None:
    report, phrases = verify_bundle(bundle, networks, "fp32")
    assert phrases == []
    assert report.partitions == 1
    exported = bundle.precision("fp32").fidelity
    assert report.images == exported.images == 8
    assert report.worst_saliency_rank == pytest.approx(exported.worst_saliency_rank, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_example_bundle_computes_what_was_recorded(digits_bundle: Path, precision: str) -> None:
    example = read_bundle(digits_bundle)
    networks = open_networks(example, precision=precision)
    try:
        report, phrases = verify_bundle(example, networks, precision)
    finally:
        networks.close()
    assert phrases == []
    assert report.logits < {"fp32": 1e-5, "fp16": 1e-2}[precision]


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("logits", r"logits [\d.]+ is above [\d.]+"),
        ("masked_logits", r"masked_logits [\d.]+ is above [\d.]+"),
        ("features_0", r"features of {0} [\d.]+ is above [\d.]+"),
        ("gradients_1", r"gradients of {1} [\d.]+ is above [\d.]+"),
        ("saliency", r"saliency_rank -?[\d.]+ is below [\d.]+"),
    ],
)
def test_tampered_reference_fails(
    bundle: Bundle, networks: Networks, tmp_path: Path, name: str, phrase: str
) -> None:
    """Reading notices the change by its hash; values that differ are told by name."""
    copy = shutil.copytree(bundle.folder, tmp_path / "copy")
    path = copy / bundle.precision("fp32").reference
    with np.load(path) as stored:
        values = dict(stored)
    values[name] = 0.9 * values[name][:, ::-1]
    np.savez_compressed(path, allow_pickle=False, **values)
    with pytest.raises(IntegrityError, match=r"reference\.npz (has \d+ bytes|was changed)"):
        read_bundle(copy)
    _, phrases = verify_bundle(Bundle(copy, bundle.manifest), networks, "fp32")
    layers = [layer.name for layer in bundle.manifest.layers]
    assert re.fullmatch(phrase.format(*layers), phrases[0])


def test_maps_are_compared_as_they_are_made_here(bundle: Bundle) -> None:
    """Not as the CPU's kernels make them, where something else does."""
    with ccam.load(bundle) as explainer:

        def upside_down(images: Floats, targets: NDArray[np.int64]) -> Explanation:
            made = explainer.explain(images, targets)
            return dataclasses.replace(made, saliency=np.ascontiguousarray(made.saliency[:, ::-1]))

        ways = (explainer.explain, upside_down)
        (_, fine), (report, phrases) = (
            verify_bundle(bundle, explainer.networks, "fp32", way) for way in ways
        )
    assert fine == []
    assert report.logits < 1e-5
    assert all(phrase.startswith("saliency_") for phrase in phrases)
    assert len(phrases) == 3


def test_precision_that_is_not_there(bundle: Bundle, networks: Networks) -> None:
    with pytest.raises(OptionError, match="the bundle has no fp16 graphs, only fp32"):
        verify_bundle(bundle, networks, "fp16")

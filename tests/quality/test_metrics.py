"""Metrics against values worked by hand and against RISE's algorithm, written plainly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from ccam_deploy.arrays import Doubles, Floats
from ccam_deploy.errors import BackendError, OptionError
from ccam_deploy.quality import metrics
from ccam_deploy.quality.metrics import PROTOCOLS, CurveName
from tests.helpers import noise
from tests.quality.scorers import LinearScorer, random_scorer

CURVE_NAMES: tuple[CurveName, CurveName] = ("deletion", "insertion")
NONE = np.zeros((0, 4))


def boxes(*rows: Sequence[float]) -> Doubles:
    return np.array(rows, np.float64).reshape(-1, 4)


def distinct(count: int, height: int, width: int, seed: int = 0) -> Floats:
    """Maps in [0, 1] without equal pixels."""
    size = height * width
    stream = np.random.default_rng(seed)
    order = np.stack([stream.permutation(size) for _ in range(count)])
    return (order / (size - 1)).astype(np.float32).reshape(count, height, width)


def rise_curve(
    scorer: LinearScorer, image: Floats, saliency: Floats, curve: CurveName, step: int
) -> list[float]:
    """One run of RISE's CausalMetric: pixel by pixel, one image at a time, PyTorch's softmax."""
    height, width = saliency.shape
    everywhere = [(y, x) for y in range(height) for x in range(width)]
    order = sorted(everywhere, key=lambda place: -saliency[place])
    start, finish = (blurred_by_rise(image), image) if curve == "insertion" else (image, 0 * image)
    current = start.copy()
    best = int(scorer.logits(image[None])[0].argmax())
    scores = []
    steps = (height * width + step - 1) // step
    for index in range(steps + 1):
        logits = torch.from_numpy(scorer.logits(current[None])[0]).double()
        scores.append(float(logits.softmax(0)[best]))
        for y, x in order[step * index : step * (index + 1)]:
            current[:, y, x] = finish[:, y, x]
    return scores


def blurred_by_rise(image: Floats) -> Floats:
    impulse = np.zeros((11, 11))
    impulse[5, 5] = 1
    kernel = np.zeros((3, 3, 11, 11))
    for channel in range(3):
        kernel[channel, channel] = gaussian_filter(impulse, 5)
    wide = torch.from_numpy(image.astype(np.float64))[None]
    blurred = torch.nn.functional.conv2d(wide, torch.from_numpy(kernel), padding=5)
    return blurred[0].numpy().astype(np.float32)


@pytest.mark.parametrize("curve", CURVE_NAMES)
@pytest.mark.parametrize("shape", [(3, 24, 16), (3, 19, 23)], ids=["whole steps", "a rest"])
def test_curves_are_rises(curve: CurveName, shape: tuple[int, int, int]) -> None:
    scorer = random_scorer(shape)
    images, maps = noise(3, *shape), distinct(3, *shape[1:])
    best = scorer.logits(images).argmax(axis=1)
    got = metrics.curves(scorer, images, maps, best, PROTOCOLS["rise"], curve, chunk=4)
    for image, saliency, points in zip(images, maps, got, strict=True):
        expected = rise_curve(scorer, image, saliency, curve, step=8 * shape[2])
        assert len(points) == len(expected) == 1 + -(-shape[1] // 8)
        np.testing.assert_allclose(points, expected, atol=2e-6)
        own_area = (sum(expected) - expected[0] / 2 - expected[-1] / 2) / (len(expected) - 1)
        assert metrics.area(points[None])[0] == pytest.approx(own_area, abs=2e-6)


def test_blur_is_rises() -> None:
    image = noise(3, 17, 30)
    np.testing.assert_allclose(metrics.blur(image[None])[0], blurred_by_rise(image), atol=1e-6)


def test_step_is_1792_of_224() -> None:
    """Both protocols at the size that RISE and the paper give: 28 steps of 3.57 %."""
    scorer = LinearScorer(np.full((2, 224 * 224), 1e-5, np.float32))
    image, saliency = np.ones((1, 1, 224, 224), np.float32), distinct(1, 224, 224)
    for protocol in PROTOCOLS.values():
        curve = metrics.curves(scorer, image, saliency, np.array([0]), protocol, "deletion", 32)
        assert curve.shape == (1, 29)


def count_scorer(height: int, width: int) -> LinearScorer:
    """Two classes; class 1's logit is the number of pixels seen of a 1-channel image of ones."""
    pixels = height * width
    return LinearScorer(np.repeat(np.array([[0], [1]], np.float32), pixels, axis=1))


def test_paper_curves_by_hand() -> None:
    """Two columns, 12 rows: steps of 16 and 8 pixels, class 1 has sigmoid(pixels seen)."""
    image, saliency = np.ones((1, 1, 12, 2), np.float32), distinct(1, 12, 2)
    scorer, one = count_scorer(12, 2), np.array([1])
    seen = {"deletion": [24, 8, 0], "insertion": [0, 16, 24]}
    for curve in CURVE_NAMES:
        points = metrics.curves(scorer, image, saliency, one, PROTOCOLS["paper"], curve, 2)
        expected = 1 / (1 + np.exp(-np.array(seen[curve], np.float64)))
        np.testing.assert_allclose(points[0], expected, rtol=1e-12)


def test_area_by_hand() -> None:
    """(0.8 + 0.5)/2 · ½ + (0.5 + 0.2)/2 · ½ = 0.5."""
    assert metrics.area(np.array([[0.8, 0.5, 0.2]]))[0] == pytest.approx(0.5)
    assert metrics.area(np.full((1, 29), 0.3))[0] == pytest.approx(0.3)


def test_perfect_map_beats_every_other() -> None:
    """Where each pixel adds its own share to the logit, the map of shares is the best there is."""
    shares = np.random.default_rng(3).random((1, 24, 8)).astype(np.float32)
    scorer = LinearScorer(np.stack([np.zeros(192), 0.1 * shares.ravel()]).astype(np.float32))
    image, one = np.ones((1, 1, 24, 8), np.float32), np.array([1])

    def overall(saliency: Floats) -> float:
        areas = {
            curve: metrics.area(
                metrics.curves(scorer, image, saliency, one, PROTOCOLS["paper"], curve, 16)
            )[0]
            for curve in CURVE_NAMES
        }
        return float(areas["insertion"] - areas["deletion"])

    best = overall(shares)
    assert best > 0
    assert overall(1 - shares) == pytest.approx(-best, abs=1e-6)
    for seed in range(5):
        assert abs(overall(distinct(1, 24, 8, seed))) < best


def test_equal_pixels_go_in_row_major_order() -> None:
    maps = np.array([[[0, 1], [1, 0]], [[5, 5], [5, 5]]], np.float32)
    np.testing.assert_array_equal(metrics.ranks(maps), [[[2, 0], [1, 3]], [[0, 1], [2, 3]]])
    steps = (np.arange(60 * 70) % 7).reshape(1, 60, 70)
    expected = sorted(range(60 * 70), key=lambda place: -int(steps.flat[place]))
    got = metrics.ranks(steps.astype(np.float32)).ravel()[expected]
    np.testing.assert_array_equal(got, np.arange(60 * 70))


def test_constant_map_takes_rows_from_the_top() -> None:
    """The first step of a constant map deletes the 8 upper rows, whatever the constant."""
    weights = np.zeros((2, 16, 2), np.float32)
    weights[1, :8] = 1
    image = np.ones((1, 1, 16, 2), np.float32)
    for value in (0, 0.5, 1):
        curve = metrics.curves(
            LinearScorer(weights.reshape(2, -1)),
            image,
            np.full((1, 16, 2), value, np.float32),
            np.array([1]),
            PROTOCOLS["paper"],
            "deletion",
            chunk=8,
        )
        np.testing.assert_allclose(curve[0], [1 / (1 + np.exp(-16)), 0.5, 0.5], rtol=1e-12)


@pytest.mark.parametrize("curve", CURVE_NAMES)
def test_no_more_than_a_chunk_is_held(curve: CurveName) -> None:
    """Chunks cut across images; whichever size they have, the curves are the same."""
    scorer = random_scorer((3, 40, 8))
    images, maps, classes = noise(3, 3, 40, 8), distinct(3, 40, 8), np.array([0, 1, 2])
    results = []
    for chunk in (1, 5, 100):
        scorer.sizes.clear()
        results.append(
            metrics.curves(scorer, images, maps, classes, PROTOCOLS["rise"], curve, chunk)
        )
        assert max(scorer.sizes) == min(chunk, 18)
        assert sum(scorer.sizes) == 18
    np.testing.assert_allclose(results[0], results[2], atol=1e-6)
    np.testing.assert_allclose(results[1], results[2], atol=1e-6)


def test_other_activations_are_pytorchs() -> None:
    logits = np.array([[1.5, -800, 3], [0, 40, 800]], np.float32)
    classes = np.array([0, 1])
    expected = torch.from_numpy(logits).double().sigmoid()[[0, 1], [0, 1]]
    got = metrics.class_probabilities(logits, classes, "sigmoid")
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert metrics.class_probabilities(logits, classes, "none").tolist() == [1.5, 40]


def test_softmax_is_pytorchs() -> None:
    logits = 40 * noise(6, 4)
    expected = torch.from_numpy(logits).double().softmax(1).numpy()
    classes = np.array([0, 1, 2, 3, 0, 1])
    got = metrics.class_probabilities(logits, classes, "softmax")
    np.testing.assert_allclose(got, expected[np.arange(6), classes], rtol=1e-12)


def test_drop_and_increase_by_hand() -> None:
    """Eq. 26, 27: drops of 25 % and 100 %; a gain is no drop; nothing can drop from 0."""
    before, after = np.array([0.8, 0.5, 0.5, 0.0]), np.array([0.6, 0.0, 0.75, 0.0])
    np.testing.assert_allclose(metrics.average_drop(before, after), [25, 100, 0, 0])
    np.testing.assert_array_equal(metrics.average_increase(before, after), [0, 0, 100, 0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_no_result(value: float) -> None:
    """An increase of NaN would count as none, and a drop of NaN as an image without boxes."""
    scorer, images = random_scorer((3, 8, 8)), noise(2, 3, 8, 8)
    images[1, 0, 0, 0] = value
    with pytest.raises(BackendError, match="NaN or infinite logits"):
        metrics.masked_logits(scorer, images, np.ones((2, 8, 8), np.float32), 2)


def test_map_of_ones_changes_nothing() -> None:
    scorer, images = random_scorer((3, 8, 8)), noise(5, 3, 8, 8)
    ones, classes = np.ones((5, 8, 8), np.float32), np.arange(5) % 3
    before = metrics.class_probabilities(
        metrics.masked_logits(scorer, images, ones, 2), classes, "softmax"
    )
    expected = metrics.class_probabilities(scorer.logits(images), classes, "softmax")
    np.testing.assert_array_equal(before, expected)
    np.testing.assert_array_equal(metrics.average_drop(before, expected), np.zeros(5))
    np.testing.assert_array_equal(metrics.average_increase(before, expected), np.zeros(5))
    assert scorer.sizes == [2, 2, 1]


def test_image_is_multiplied_by_the_map() -> None:
    """Half of each of four pixels of 1: a logit of 2 for class 1."""
    image, half = np.ones((1, 1, 2, 2), np.float32), np.full((1, 2, 2), 0.5, np.float32)
    got = metrics.masked_logits(count_scorer(2, 2), image, half, 8)
    np.testing.assert_array_equal(got, [[0, 2]])


def test_pixels_of_a_box() -> None:
    """x goes along columns, y along rows; right and bottom are exclusive; a centre decides."""
    wide = metrics.box_mask(boxes((1, 0, 4, 2)), (3, 5))
    np.testing.assert_array_equal(wide, [[0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    fraction = metrics.box_mask(boxes((0.5, 0.6, 2.4, 2)), (3, 3))
    np.testing.assert_array_equal(fraction, [[0, 0, 0], [1, 1, 0], [0, 0, 0]])
    assert metrics.box_mask(boxes((-5, -5, 99, 99)), (3, 3)).all()
    assert not metrics.box_mask(NONE, (3, 3)).any()


def test_proportion_by_hand() -> None:
    """Columns 1 and 2 of row 0 hold 1 + 2 of 10; with the axes swapped it would be 2 + 3."""
    saliency = np.array([[0, 1, 2], [3, 4, 0]], np.float32)
    assert metrics.proportion(saliency, boxes((1, 0, 3, 1))) == pytest.approx(30)
    assert metrics.proportion(saliency, boxes((0, 1, 1, 2))) == pytest.approx(30)
    assert metrics.proportion(saliency, boxes((0, 0, 3, 2))) == pytest.approx(100)
    assert metrics.proportion(saliency, boxes((2, 1, 3, 2))) == 0


def test_boxes_count_once_where_they_overlap() -> None:
    saliency = np.ones((4, 4), np.float32)
    assert metrics.proportion(saliency, boxes((0, 0, 2, 2), (1, 1, 3, 3))) == pytest.approx(
        700 / 16
    )
    same = boxes((0, 0, 2, 4), (0, 0, 2, 4))
    assert metrics.proportion(saliency, same) == pytest.approx(50)


def test_perfect_and_constant_maps_have_their_proportion() -> None:
    """All energy inside is 100; a constant map has the box's share of the image."""
    box = boxes((3, 2, 8, 6))
    perfect = metrics.box_mask(box, (10, 12)).astype(np.float32)
    assert metrics.proportion(perfect, box) == 100
    assert metrics.proportion(np.full((10, 12), 0.3, np.float32), box) == pytest.approx(100 / 6)
    assert metrics.proportion(np.zeros((10, 12), np.float32), box) == 0
    assert np.isnan(metrics.proportion(perfect, NONE))
    assert np.isnan(metrics.proportion(perfect, boxes((50, 50, 60, 60))))


def test_boxes_at_the_edges_hold_the_last_pixels() -> None:
    saliency = np.zeros((5, 7), np.float32)
    saliency[4, 6] = 1
    corner = boxes((6, 4, 7, 5))
    assert metrics.proportion(saliency, corner) == 100
    assert metrics.pointing(saliency, corner) == 100
    assert metrics.pointing(saliency, boxes((0, 0, 6, 5), (0, 0, 7, 4))) == 0


def test_pointing_game_by_hand() -> None:
    """The highest pixel is at row 3, column 20; a box's last column is 4, so it is 16 away."""
    saliency = np.zeros((30, 40), np.float32)
    saliency[3, 20] = 1
    near = boxes((0, 0, 5, 10))
    assert metrics.pointing(saliency, near) == 0
    assert metrics.pointing(saliency, near, 15) == 0
    assert metrics.pointing(saliency, near, 16) == 100
    assert metrics.pointing(saliency, boxes((0, 12, 12, 30)), 12) == 0  # 9 across, 9 down: 12.7
    assert metrics.pointing(saliency, boxes((0, 12, 12, 30)), 13) == 100
    assert metrics.pointing(saliency, boxes((0, 12, 12, 30), (20, 0, 21, 4))) == 100


def test_pointing_of_flat_maps() -> None:
    """The first of equal pixels is the upper left one; a map of zeros points nowhere."""
    box = boxes((0, 0, 2, 2))
    assert metrics.pointing(np.full((6, 6), 0.4, np.float32), box) == 100
    assert metrics.pointing(np.zeros((6, 6), np.float32), box, 15) == 0
    assert np.isnan(metrics.pointing(np.ones((6, 6), np.float32), NONE))


def test_unknown_names_are_one_line() -> None:
    with pytest.raises(OptionError, match=r'metric "road" is unknown; there are average-drop, .*'):
        metrics.reject_unknown(["deletion", "road"], "paper")
    with pytest.raises(OptionError, match='protocol "mine" is unknown; there are paper, rise'):
        metrics.reject_unknown(["deletion"], "mine")


def test_every_metric_and_protocol_has_a_definition() -> None:
    assert all(metric.definition for metric in metrics.METRICS.values())
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name
        assert protocol.definition

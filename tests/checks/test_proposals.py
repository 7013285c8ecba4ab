"""Peaks, overlaps and rankings worked by hand; selective search on a picture of one square."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from ccam_deploy.checks import proposals
from ccam_deploy.checks.proposals import Peak, Recall, coverage, guided, iou, peaks
from ccam_deploy.errors import OptionError

LEFT, RIGHT = Peak(2, 2, 1.0), Peak(8, 2, 0.7)
BOTH, ON_LEFT, ON_RIGHT, EMPTY = (0, 0, 10, 5), (1, 1, 4, 4), (7, 1, 9, 4), (5, 0, 6, 5)


def test_peaks_are_the_local_maxima_from_the_highest_down() -> None:
    values = np.zeros((36, 24), np.float32)
    values[30, 4], values[30, 5], values[5, 20], values[10, 2] = 0.625, 0.5, 1.0, 0.49
    assert peaks(values) == [Peak(20, 5, 1.0), Peak(4, 30, 0.625)]
    lower = peaks(values, 0.4)
    assert [(peak.x, peak.y) for peak in lower] == [(20, 5), (4, 30), (2, 10)]


def test_a_peak_rules_its_neighbourhood() -> None:
    """24 pixels: two to each side."""
    values = np.zeros((24, 24), np.float32)
    values[12, 10], values[12, 12] = 1.0, 0.9
    assert len(peaks(values)) == 1
    values[12, 12], values[12, 13] = 0, 0.9
    assert len(peaks(values)) == 2


def test_a_plateau_is_one_peak_in_its_middle() -> None:
    values = np.zeros((30, 30), np.float32)
    values[10:13, 10:21] = 1
    assert peaks(values) == [Peak(15, 11, 1.0)]


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_map_without_positive_values_has_no_peaks(value: float) -> None:
    assert peaks(np.full((9, 9), value, np.float32)) == []


@pytest.mark.parametrize("threshold", [0.0, 1.01, float("nan")])
def test_a_threshold_out_of_range(threshold: float) -> None:
    with pytest.raises(OptionError, match=rf"threshold is {threshold}; it must be in \(0, 1\]"):
        peaks(np.ones((9, 9), np.float32), threshold)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ((0, 0, 4, 2), 1.0),
        ((2, 0, 6, 2), 4 / 12),  # half of each
        ((0, 0, 2, 2), 4 / 8),
        ((4, 0, 8, 2), 0.0),  # edges touch
        ((10, 10, 11, 11), 0.0),
    ],
)
def test_iou_by_hand(other: tuple[int, int, int, int], expected: float) -> None:
    assert iou((0, 0, 4, 2), other) == pytest.approx(expected)
    assert iou(other, (0, 0, 4, 2)) == pytest.approx(expected)


def test_each_peak_gets_the_best_candidate_that_contains_it() -> None:
    ranked = [EMPTY, ON_RIGHT, ON_LEFT, BOTH]
    assert guided(ranked, [LEFT, RIGHT]) == [ON_LEFT, ON_RIGHT]
    assert guided([EMPTY, BOTH, ON_LEFT], [LEFT, RIGHT]) == [BOTH]
    assert guided([EMPTY], [LEFT]) == guided([BOTH], []) == []


def test_peaks_take_turns_where_more_boxes_are_wanted() -> None:
    ranked = [ON_LEFT, EMPTY, (0, 0, 4, 5), ON_RIGHT, BOTH]
    assert guided(ranked, [LEFT, RIGHT], 3) == [ON_LEFT, ON_RIGHT, (0, 0, 4, 5)]
    assert guided(ranked, [LEFT, RIGHT], 1) == [ON_LEFT]
    assert guided(ranked, [LEFT, RIGHT], 9) == [ON_LEFT, ON_RIGHT, (0, 0, 4, 5), BOTH]


def test_the_right_and_lower_edges_are_outside() -> None:
    assert guided([(0, 0, 2, 5), (0, 0, 5, 2)], [LEFT]) == []


def test_coverage_by_hand() -> None:
    """IoUs of 1, 1/2 and 0 for three objects in two pictures; each has its best box."""
    proposed = [[(0, 0, 4, 2), (0, 0, 1, 1)], []]
    objects = [[(0, 0, 4, 2), (0, 0, 2, 2)], [(3, 3, 5, 5)]]
    assert coverage(proposed, objects) == Recall(2 / 3, 0.5, 3, 2)


def test_coverage_of_no_objects() -> None:
    with pytest.raises(ValueError, match="there are no objects to cover"):
        coverage([[BOTH]], [[]])


def square(side: int, size: tuple[int, int]) -> Image.Image:
    """A white square of a side at (30, 20) in a picture of dark grey."""
    picture = Image.new("RGB", size, (40, 60, 80))
    picture.paste((255, 250, 240), (30, 20, 30 + side, 20 + side))
    return picture


@pytest.mark.parametrize("mode", ["fast", "quality"])
def test_selective_search_finds_a_square(mode: proposals.Mode) -> None:
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    picture = square(40, (120, 90))
    boxes = proposals.selective_search(picture, mode)
    assert max(iou(box, (30, 20, 70, 60)) for box in boxes) > 0.9
    assert all(0 <= left < right <= 120 and 0 <= top < low <= 90 for left, top, right, low in boxes)


def test_selective_search_is_the_same_every_time() -> None:
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    noise = np.random.default_rng(0).integers(0, 255, (12, 12, 3), np.uint8)
    picture = Image.fromarray(noise).resize((96, 96), Image.Resampling.BICUBIC)
    first = proposals.selective_search(picture, seed=3)
    assert first == proposals.selective_search(picture, seed=3)
    other = proposals.selective_search(picture, seed=4)
    assert first != other
    assert sorted(first) == sorted(other)


@pytest.mark.slow
def test_large_pictures_are_searched_at_a_smaller_size() -> None:
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    picture = square(400, (1500, 600))
    boxes = proposals.selective_search(picture)
    assert max(iou(box, (30, 20, 430, 420)) for box in boxes) > 0.9


def test_an_unknown_mode() -> None:
    with pytest.raises(OptionError, match='mode "slow" is unknown; there are fast, quality'):
        proposals.selective_search(square(9, (20, 20)), "slow")  # type: ignore[arg-type]


def test_without_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(OptionError, match=r"pip install 'ccam-deploy\[proposals\]'"):
        proposals.selective_search(square(9, (20, 20)))

"""Estimates against SciPy's bootstrap; tables and the page say what was measured."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from scipy import stats

import ccam_deploy as ccam
from ccam_deploy import render
from ccam_deploy.preprocess import restore_image
from ccam_deploy.quality import charts, report
from ccam_deploy.quality.datasets import Dataset, Item, open_dataset
from ccam_deploy.quality.metrics import METRICS
from ccam_deploy.quality.results import Row
from ccam_deploy.quality.variants import Variant

SETTINGS = {
    "bundle": "b<1>",
    "dataset": "scenes",
    "precision": "fp32",
    "backend": "onnxruntime-cpu",
    "methods": {"one": {}, "two": {}},
    "metrics": ["deletion", "proportion", "pointing"],
    "protocol": "rise",
    "target": "predicted",
    "seed": 3,
    "images": 4,
}


def rows() -> list[Row]:
    """Deletion 10, 20, 30, 40 and ten more; one image without boxes; pointing never measured."""
    nothing = float("nan")
    return [
        Row(
            index,
            f"image {index}",
            method,
            0,
            0.5,
            {
                "deletion": 10.0 * index + 10 + extra,
                "proportion": nothing if index == 0 else 50.0 + index,
                "pointing": nothing,
            },
            {"deletion": np.array([1.0, index])},
        )
        for method, extra in (("one", 0), ("two", 10))
        for index in range(4)
    ]


def test_bootstrap_is_scipys() -> None:
    values = np.random.default_rng(0).gamma(2, 10, 300)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    estimate = report.bootstrap(values, seed=0)
    assert estimate.mean == pytest.approx(values.mean())
    width = expected.high - expected.low
    assert estimate.low == pytest.approx(expected.low, abs=0.06 * width)
    assert estimate.high == pytest.approx(expected.high, abs=0.06 * width)
    assert estimate == report.bootstrap(values, seed=0)
    assert estimate != report.bootstrap(values, seed=1)


def test_bootstrap_leaves_out_what_was_not_measured() -> None:
    estimate = report.bootstrap(np.array([7.0, np.nan, 7.0]), seed=0)
    assert (estimate.mean, estimate.low, estimate.high, estimate.images) == (7, 7, 7, 2)
    with pytest.raises(ValueError, match="nothing to estimate"):
        report.bootstrap(np.array([np.nan]), seed=0)


def test_values_of_a_group_are_drawn_together() -> None:
    """Copies add no information: the interval is that of one value a group, here of equal sizes."""
    values = np.random.default_rng(0).gamma(2, 10, 12)
    copies, names = np.repeat(values, 25), [f"photograph {place // 25}" for place in range(300)]
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    estimate = report.bootstrap(copies, seed=0, groups=names)
    width = expected.high - expected.low
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.images == 300
    assert estimate.low == pytest.approx(expected.low, abs=0.06 * width)
    assert estimate.high == pytest.approx(expected.high, abs=0.06 * width)
    alone = report.bootstrap(copies, seed=0)
    assert alone.high - alone.low < width / 3


def test_groups_of_unequal_sizes_weigh_by_their_images() -> None:
    """Two groups: a resample has the first, the second, or both, whose mean is over all images."""
    values = np.array([0.0, 90.0, 90.0, np.nan])
    estimate = report.bootstrap(values, seed=0, groups=["a", "b", "b", "a"])
    assert (estimate.mean, estimate.low, estimate.high, estimate.images) == (60, 0, 90, 3)


def test_a_summary_says_what_was_resampled() -> None:
    pairs = report.Grouping("photographs", lambda name: name[:7] + str(int(name[-1]) // 2))
    summary = report.summarise(SETTINGS, rows(), pairs)
    deletion = summary.estimates["one"]["deletion"]
    assert (deletion.mean, deletion.low, deletion.high) == (25, 15, 35)
    assert report.as_json(summary)["unit"].endswith("by bootstrap over photographs")
    assert "images of scenes, resampled by photographs; bundle" in report.markdown(summary)


def test_summary_by_hand() -> None:
    summary = report.summarise(SETTINGS, rows())
    one, two = summary.estimates["one"], summary.estimates["two"]
    assert (one["deletion"].mean, two["deletion"].mean) == (25, 35)
    assert (one["proportion"].mean, one["proportion"].images) == (52, 3)
    assert "pointing" not in one
    assert 10 <= one["deletion"].low < 25 < one["deletion"].high <= 40
    np.testing.assert_array_equal(summary.curves["one"]["deletion"], [1, 1.5])
    assert "insertion" not in summary.curves["one"]


def test_differences_pair_the_methods_image_by_image() -> None:
    """All of "two" exceed "one" by ten: their means' intervals overlap, the difference has none."""
    summary = report.summarise(SETTINGS, rows())
    assert summary.differences["one"] == {}
    assert summary.differences["two"] == {
        "deletion": report.Estimate(10, 10, 10, 4),
        "proportion": report.Estimate(0, 0, 0, 3),
    }
    lines = report.differences_table(summary).splitlines()
    assert lines[0] == "| minus one | deletion, % ↓ | proportion, % ↑ | pointing, % ↑ |"
    assert lines[2:] == ["| two | **+10.00** [+10.00, +10.00] | +0.00 [+0.00, +0.00] | – |"]
    assert "By how much each exceeds one on the same images" in report.markdown(summary)
    plain = json.loads(json.dumps(report.as_json(summary)["differences"]))
    assert plain["two"]["deletion"] == {"mean": 10, "low": 10, "high": 10, "images": 4}


def test_differences_are_scipys_and_of_images_that_both_have() -> None:
    stream = np.random.default_rng(0)
    one, more = stream.gamma(2, 10, 60), stream.normal(3, 4, 60)
    measured = [
        Row(index, f"image {index}", method, 0, 0.5, {"deletion": float(values[index])})
        for method, values in (("two", one + more), ("one", one))
        for index in range(60)
        if (method, index) not in {("one", 0), ("two", 1)}
    ]
    summary = report.summarise({**SETTINGS, "metrics": ["deletion"]}, measured)
    expected = stats.bootstrap(
        (one[2:] + more[2:], one[2:]),
        lambda two, one, axis: np.mean(two - one, axis=axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    found = summary.differences["two"]["deletion"]
    width = expected.high - expected.low
    assert found.images == 58
    assert found.mean == pytest.approx(more[2:].mean())
    assert found.low == pytest.approx(expected.low, abs=0.06 * width)
    assert found.high == pytest.approx(expected.high, abs=0.06 * width)


def test_what_is_shown_as_zero_is_zero() -> None:
    assert not report.Estimate(0.02, 0.0017, 0.04, 5).excludes_zero
    assert report.Estimate(0.02, 0.01, 0.04, 5).excludes_zero
    shift = [replace(row, values={**row.values, "deletion": -0.001}) for row in rows()]
    text = report.markdown(report.summarise(SETTINGS, shift))
    assert "| one | 0.00 [0.00, 0.00] |" in text
    assert "-0.00" not in text


def test_images_that_could_not_be_read_are_named() -> None:
    unread = [Row(9 + n, f"lost|{n}", "one", -1, 0.0, {}) for n in range(7)]
    summary = report.summarise({**SETTINGS, "images": 11}, rows() + unread)
    line = (
        "over 4 images of scenes, without 7 more that could not be read (lost|0, lost|1, lost|2, "
    )
    assert f"{line}lost|3, lost|4, …); bundle" in report.markdown(summary)


def test_one_method_has_no_differences() -> None:
    alone = {**SETTINGS, "methods": {"one": {}}}
    summary = report.summarise(alone, rows())
    assert report.differences_table(summary) == ""
    assert "exceeds" not in report.markdown(summary)
    assert "exceeds" not in report.page(summary, {})


def test_table_marks_the_best() -> None:
    lines = report.table(report.summarise(SETTINGS, rows())).splitlines()
    assert lines[0] == "| method | deletion, % ↓ | proportion, % ↑ | pointing, % ↑ |"
    assert lines[2].startswith("| one | **25.00** [")
    assert lines[3].startswith("| two | 35.00 [")
    assert all(line.endswith("| – |") and "| 52.00 [" in line for line in lines[2:])


def test_every_file_names_its_definitions() -> None:
    summary = report.summarise(SETTINGS, rows())
    plain = json.loads(json.dumps(report.as_json(summary), allow_nan=False))
    assert plain["definitions"]["deletion"] == METRICS["deletion"].definition
    assert "blurred by an 11×11 Gaussian" in plain["protocol"]
    assert plain["results"]["one"]["proportion"]["images"] == 3
    assert plain["settings"] == SETTINGS
    text = report.markdown(summary)
    for name in ("deletion", "proportion", "pointing"):
        assert f"- {name}: {METRICS[name].definition}." in text
    assert "- protocol rise: " in text
    assert "over 4 images of scenes" in text


def test_a_data_set_of_any_name_stays_on_its_line() -> None:
    settings = {**SETTINGS, "dataset": "odd\nname\x1b"}
    text = report.markdown(report.summarise(settings, rows()))
    assert r"over 4 images of odd\nname\x1b; bundle" in text


class Reader(HTMLParser):
    """Checks that tags close, and collects addresses and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_needs_no_other_file() -> None:
    page = report.page(report.summarise(SETTINGS, rows()), {"Maps & more": b"\x89PNG"})
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    assert reader.addresses == ["data:image/png;base64,iVBORw=="]
    assert not re.search(r"https?:|@import|url\(", page)
    assert "b<1> on scenes" in reader.text
    assert "Maps & more" in reader.text
    assert METRICS["proportion"].definition in reader.text
    assert page.count('class="bold"') == 2  # the lower deletion, and by how much; others are equal
    assert "minus one" in reader.text


@pytest.mark.slow
def test_curves_are_drawn_side_by_side() -> None:
    """A deletion curve alone, in matplotlib's first colour, is on the left and nowhere else."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    curves = {"one": {"deletion": np.linspace(1, 0, 5)}, "two": {}}
    with Image.open(io.BytesIO(charts.draw_curves(curves))) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    y, x = np.nonzero((pixels == (0x1F, 0x77, 0xB4)).all(axis=2))
    assert len(x) > 500
    assert x.max() < pixels.shape[1] / 2
    assert y[x == x.min()].max() < y[x == x.max()].min() - 100  # it falls


def test_boxes_are_outlined_by_their_own_pixels() -> None:
    """Right and bottom are exclusive; inside, the picture stays."""
    picture = Image.new("RGB", (8, 6))
    framed = np.asarray(charts._framed(picture, np.array([[1.0, 2, 6, 5]])))[..., 0]
    expected = np.zeros((6, 8), np.uint8)
    expected[2:5, 1:6] = 255
    expected[3, 2:5] = 0
    np.testing.assert_array_equal(framed, expected)


@pytest.mark.slow
def test_maps_are_a_grid(digits: ccam.Explainer) -> None:
    """A row for each of six images at most, a column for each method and one for the image."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    data = open_dataset("scenes", digits.bundle.manifest)
    one = Variant("one", ccam.CollectionCAM())
    sizes = {}
    for shown, methods in ((1, 1), (1, 2), (9, 1)):
        rows = [Row(n, "", "one", n, 0.5, {}) for n in range(shown)]
        content = charts.draw_maps(digits, data, [one] * methods, rows)
        with Image.open(io.BytesIO(content)) as picture:
            sizes[shown, methods] = picture.size
    width, height = sizes[1, 1]
    assert sizes[1, 2][0] - width == pytest.approx(width / 2, abs=4)
    assert sizes[9, 1] == (width, 6 * height)


class Wide(Dataset):
    """One picture three times as wide as high."""

    names = ("wide",)

    def __getitem__(self, index: int) -> Item:
        pixels = np.random.default_rng(0).integers(0, 200, (96, 288, 3)).astype(np.uint8)
        return Item("wide", lambda: Image.fromarray(pixels))


def test_maps_show_the_centre_crop_alone(digits: ccam.Explainer) -> None:
    """Nothing is coloured that the network did not see: a tile is the network's input."""
    data = Wide()
    rows = [Row(0, "wide", "one", 3, 0.5, {})]
    content = charts.draw_maps(digits, data, [Variant("one", ccam.GradCAM())], rows)
    images, _ = digits.preprocess([data[0].read()])
    how = digits.bundle.manifest.preprocessing
    seen = restore_image(images[0], how.mean, how.std).convert("RGB")
    saliency = digits.explain(images, [3], method=ccam.GradCAM()).saliency[0]
    tiles = [(digits.bundle.manifest.label(3), seen), ("one", render.overlay(seen, saliency))]
    with Image.open(io.BytesIO(content)) as picture:
        np.testing.assert_array_equal(picture, render.grid([tiles], 192))

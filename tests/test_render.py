"""Colours, overlays, color bars and panels, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ccam_deploy import render
from ccam_deploy.errors import OptionError

RAMP = np.array([[0, 0.5, 1]], np.float32)
WHITE = (255, 255, 255)
ENDS = {
    "jet": [(0, 0, 128), (128, 0, 0)],
    "turbo": [(48, 18, 59), (122, 4, 3)],
    "viridis": [(68, 1, 84), (253, 231, 37)],
    "inferno": [(0, 0, 4), (252, 255, 164)],
    "magma": [(0, 0, 4), (252, 253, 191)],
    "hot": [(11, 0, 0), (255, 255, 255)],
    "gray": [(0, 0, 0), (255, 255, 255)],
}
"""The colours of 0 and 1 that Matplotlib has."""


def colour_of(picture: Image.Image, x: int, y: int) -> tuple[int, ...]:
    pixels = np.asarray(picture)
    return tuple(int(value) for value in pixels[y, x])


def extent(picture: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """left, top, right, bottom of a colour in a picture, right and bottom exclusive."""
    y, x = np.argwhere((np.asarray(picture) == colour).all(axis=2)).T
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


@pytest.mark.parametrize("name", render.COLORMAPS)
def test_color_maps_have_their_known_ends(name: str) -> None:
    coloured = render.colours(RAMP, name)
    assert coloured.shape == (1, 3, 3)
    assert coloured.dtype == np.uint8
    np.testing.assert_allclose(coloured[0, [0, 2]].astype(int), ENDS[name], atol=1)


def test_jet_is_green_in_the_middle_and_the_default() -> None:
    red, green, blue = (int(value) for value in render.colours(RAMP)[0, 1])
    assert green == 255
    assert red == pytest.approx(128, abs=8)
    assert blue == pytest.approx(128, abs=8)
    np.testing.assert_array_equal(render.colours(RAMP), render.colours(RAMP, "jet"))


def test_values_outside_the_unit_interval_get_the_end_colours() -> None:
    beyond = render.colours(np.array([[-3, 7]], np.float32), "viridis")
    np.testing.assert_array_equal(beyond, render.colours(RAMP[:, ::2], "viridis"))


def test_gray_shows_every_value() -> None:
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16, 1).repeat(3, axis=2)
    np.testing.assert_array_equal(render.colours(values, "gray"), expected)


@pytest.mark.parametrize("call", [render.require_colormap, lambda name: render.colours(RAMP, name)])
def test_unknown_color_map_is_named(call: object) -> None:
    assert callable(call)
    with pytest.raises(OptionError, match='color map "rainbow" is unknown; there are jet, turbo,'):
        call("rainbow")


def test_heat_map_has_the_colours_and_the_size() -> None:
    values = np.linspace(0, 1, 60, dtype=np.float32).reshape(6, 10)
    picture = render.heatmap(values, "magma")
    assert picture.size == (10, 6)
    np.testing.assert_array_equal(picture, render.colours(values, "magma"))


def test_overlay_by_hand() -> None:
    """0.75 · (100, 40, 8) + 0.25 · white = (138.75, 93.75, 69.75), rounded; black halves less."""
    picture = Image.new("RGB", (2, 1), (100, 40, 8))
    mixed = render.overlay(picture, np.array([[1, 0]], np.float32), "gray", 0.25)
    assert colour_of(mixed, 0, 0) == (139, 94, 70)
    assert colour_of(mixed, 1, 0) == (75, 30, 6)


@pytest.mark.parametrize(("opacity", "expected"), [(0.0, (9, 8, 7)), (1.0, (128, 0, 0))])
def test_overlay_at_its_limits(opacity: float, expected: tuple[int, int, int]) -> None:
    picture = Image.new("RGB", (3, 3), (9, 8, 7))
    mixed = render.overlay(picture, np.ones((3, 3), np.float32), "jet", opacity)
    np.testing.assert_array_equal(mixed, np.full((3, 3, 3), expected))


def test_overlay_takes_pictures_of_any_mode() -> None:
    picture = Image.new("L", (3, 3), 200)
    mixed = render.overlay(picture, np.zeros((3, 3), np.float32), "gray", 0.5)
    assert (mixed.mode, colour_of(mixed, 1, 1)) == ("RGB", (100, 100, 100))


@pytest.mark.parametrize("opacity", [-0.01, 1.5, float("nan")])
def test_opacity_out_of_range(opacity: float) -> None:
    with pytest.raises(OptionError, match=rf"opacity is {opacity}; it must be in \[0, 1\]"):
        render.overlay(Image.new("RGB", (3, 1)), RAMP, opacity=opacity)


def test_sizes_that_differ_are_named() -> None:
    with pytest.raises(OptionError, match="the map is 3x1, the picture 1x3"):
        render.overlay(Image.new("RGB", (1, 3)), RAMP)


@pytest.mark.parametrize("size", [(224, 224), (96, 160), (10, 8)])
def test_colour_bar_runs_from_one_to_zero(size: tuple[int, int]) -> None:
    height, width = size
    flat = np.full(size, 0.5, np.float32)
    plain, barred = render.heatmap(flat), render.heatmap(flat, bar=True)
    assert barred.height == height
    np.testing.assert_array_equal(barred.crop((0, 0, width, height)), plain)
    left = width + 4
    bar_width = max(8, height // 16)
    bar = np.asarray(barred)[:, left : left + bar_width]
    ramp = np.linspace(1, 0, height, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(bar, render.colours(ramp).repeat(bar_width, axis=1))
    assert colour_of(barred, left - 1, 0) == WHITE
    assert colour_of(barred, left + bar_width, 0) == WHITE
    assert colour_of(barred, left, 0) == (128, 0, 0)
    assert colour_of(barred, left, height - 1) == (0, 0, 128)


def test_colour_bar_has_its_labels_inside() -> None:
    """Dark text right of the bar, in three groups, and none that the border cuts off."""
    barred = np.asarray(render.heatmap(np.zeros((192, 50), np.float32), bar=True).convert("L"))
    beside = barred[:, 50 + 4 + 12 :]
    rows = np.flatnonzero((beside < 128).any(axis=1))
    starts = 1 + np.count_nonzero(np.diff(rows) > 20)
    assert starts == 3
    assert rows[-1] < 192
    assert (beside[:, -1] == 255).all()


def test_overlay_has_a_bar_if_wanted() -> None:
    picture, values = Image.new("RGB", (64, 64), (10, 20, 30)), np.zeros((64, 64), np.float32)
    plain, barred = (render.overlay(picture, values, bar=bar) for bar in (False, True))
    assert plain.size == (64, 64)
    assert barred.width > 64 + 4 + 8
    np.testing.assert_array_equal(barred.crop((0, 0, 64, 64)), plain)


TILES = [
    ("image", Image.new("RGB", (96, 96), (255, 0, 0))),
    ("a caption that is far wider than its picture", Image.new("RGB", (50, 100), (0, 255, 0))),
    ("wide", Image.new("RGB", (300, 150), (0, 0, 255))),
]


@pytest.mark.parametrize(("height", "shown"), [(0, 192), (120, 120)])
def test_panel_sets_pictures_side_by_side(height: int, shown: int) -> None:
    """Each picture has the height and its own shape; none reaches into the next one's caption."""
    panel = render.panel(TILES, height)
    boxes = [extent(panel, colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for (left, top, right, bottom), (_, tile) in zip(boxes, TILES, strict=True):
        assert bottom - top == shown
        assert right - left == round(tile.width * shown / tile.height)
        assert bottom + 4 == panel.height
    assert boxes[0][2] + 4 == boxes[1][0]
    assert boxes[1][2] + 4 < boxes[2][0]
    assert boxes[2][2] + 4 == panel.width


def test_captions_do_not_touch_pictures_or_each_other() -> None:
    panel = render.panel(TILES)
    top = extent(panel, (255, 0, 0))[1]
    dark = np.asarray(panel.convert("L"))[:top] < 128
    rows = np.flatnonzero(dark.any(axis=1))
    assert rows[0] >= 2
    assert rows[-1] < top - 1
    starts = [extent(panel, colour)[0] for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for start, end in zip(starts, [*starts[1:], panel.width + 4], strict=True):
        columns = np.flatnonzero(dark[:, start:end].any(axis=0))
        assert columns[0] < 5
        assert columns[-1] < end - start - 3


def test_panel_is_as_high_as_its_tallest_picture() -> None:
    tall = Image.new("RGB", (100, 400), (1, 2, 3))
    panel = render.panel([("tall", tall), *TILES])
    left, top, right, bottom = extent(panel, (1, 2, 3))
    assert (right - left, bottom - top) == (100, 400)


def test_empty_panel_is_refused() -> None:
    with pytest.raises(OptionError, match="a panel needs at least one picture"):
        render.panel([])


def test_grid_has_its_pictures_in_columns() -> None:
    """As wide as the widest tile or caption of each column, and rows of one height."""
    red, green = (255, 0, 0), (0, 255, 0)
    below = [("a caption that is far wider than the one above", Image.new("RGB", (96, 96), green))]
    grid = render.grid([TILES, [*below, *TILES[1:]]])
    assert grid.width > render.panel(TILES).width
    assert grid.height == 2 * render.panel(TILES).height
    assert extent(grid, red)[:2] == (4, extent(render.panel(TILES), red)[1])
    np.testing.assert_array_equal(
        grid.crop((0, grid.height // 2, *grid.size)), render.panel([*below, *TILES[1:]])
    )


def test_a_shorter_row_of_a_grid_leaves_its_end_empty() -> None:
    grid = render.grid([TILES, TILES[:1]])
    assert grid.size == render.grid([TILES, TILES]).size
    whole = np.asarray(render.panel(TILES))
    np.testing.assert_array_equal(np.asarray(grid)[: len(whole)], whole)
    alone = np.asarray(render.panel(TILES[:1], 192))
    below = np.asarray(grid)[len(whole) :]
    np.testing.assert_array_equal(below[:, : alone.shape[1]], alone)
    assert (below[:, alone.shape[1] :] == 255).all()


def test_large_pictures_are_shown_smaller() -> None:
    picture, values = Image.new("RGB", (2048, 512)), np.ones((512, 2048), np.float32)
    small, scaled = render.shrunk(picture, values)
    assert (small.size, scaled.shape) == ((1024, 256), (256, 1024))
    assert render.thumbnail(small) is small


def test_boxes_are_outlined_where_they_are() -> None:
    """A picture of 96 pixels is shown four times as large; a box's edges lie inside it."""
    green, red = (0, 255, 0), (255, 0, 0)
    groups = {red: [(50, 5, 60, 20)], green: [(10, 5, 30, 20), (12, 7, 16, 9)]}
    boxed = render.boxed(Image.new("RGB", (96, 48)), groups)
    assert boxed.size == (384, 192)
    assert extent(boxed, green) == (40, 20, 120, 80)
    assert extent(boxed, red) == (200, 20, 240, 80)
    assert colour_of(boxed, 80, 50) == (0, 0, 0)
    assert render.boxed(Image.new("RGB", (600, 300)), {}).size == (600, 300)


def test_outside_of_what_was_seen_the_picture_stays() -> None:
    """A frame of one pixel, blended colours inside of it, and not a pixel changed around it."""
    pixels = np.random.default_rng(0).integers(0, 200, (40, 90, 3)).astype(np.uint8)
    saliency = np.random.default_rng(1).random((40, 90)).astype(np.float32)
    picture, seen = Image.fromarray(pixels), (25, 0, 65, 40)
    plain = np.asarray(render.overlay(picture, saliency))
    shown = np.asarray(render.overlay(picture, saliency, seen=seen))
    outside = np.ones((40, 90), np.bool_)
    outside[:, 25:65] = False
    np.testing.assert_array_equal(shown[outside], pixels[outside])
    np.testing.assert_array_equal(shown[1:39, 26:64], plain[1:39, 26:64])
    frame = np.concatenate([shown[0, 25:65], shown[39, 25:65], shown[:, 25], shown[:, 64]])
    assert (frame == 255).all()
    heat = np.asarray(render.heatmap(saliency, seen=seen))
    assert (heat[outside] == 224).all()
    np.testing.assert_array_equal(heat[1:39, 26:64], render.colours(saliency)[1:39, 26:64])
    frame = np.concatenate([heat[0, 25:65], heat[39, 25:65], heat[:, 25], heat[:, 64]])
    assert (frame == 255).all()


def test_a_picture_that_was_seen_whole_has_no_frame() -> None:
    picture, saliency = Image.new("RGB", (6, 4), "gray"), np.zeros((4, 6), np.float32)
    whole = render.overlay(picture, saliency, seen=(0, 0, 6, 4))
    np.testing.assert_array_equal(whole, render.overlay(picture, saliency))
    heat = render.heatmap(saliency, seen=(0, 0, 6, 4))
    np.testing.assert_array_equal(heat, render.heatmap(saliency))

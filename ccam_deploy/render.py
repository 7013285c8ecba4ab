"""Pictures of saliency maps: heat maps, overlays, panels."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ccam_deploy.arrays import Floats
from ccam_deploy.errors import OptionError

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
Tile = tuple[str, Image.Image]
"""A caption and a picture."""
Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels, right and bottom exclusive."""

COLORMAPS = ("jet", "turbo", "viridis", "inferno", "magma", "hot", "gray")
DEFAULT_COLORMAP = "jet"
_MARGIN = 4
_SMALLEST_TILE = 192
_LARGEST_SIDE = 1024
_BOXED_SIDE = 384
_UNSEEN = (224, 224, 224)
"""The colour of a heat map where the network saw nothing."""
_FRAME_SHARE = 300
"""A frame is a pixel wide for every so many pixels of the picture's shorter side."""


@dataclass(frozen=True)
class Look:
    """How maps are shown.

    Attributes:
        colormap: A name among COLORMAPS.
        opacity: How much of the picture an overlay hides, in [0, 1].
        bar: Whether a color bar stands beside the map.
    """

    colormap: str = DEFAULT_COLORMAP
    opacity: float = 0.5
    bar: bool = False


def require_colormap(name: str) -> None:
    """Refuse an unknown color map.

    Raises:
        OptionError: The name is not among COLORMAPS.
    """
    if name not in COLORMAPS:
        raise OptionError(f'color map "{name}" is unknown; there are {", ".join(COLORMAPS)}')


def colours(saliency: Floats, colormap: str = DEFAULT_COLORMAP) -> NDArray[np.uint8]:
    """Colour a map.

    Args:
        saliency: [H, W] float32 in [0, 1].
        colormap: A name among COLORMAPS.

    Returns:
        [H, W, 3] uint8.

    Raises:
        OptionError: The color map is unknown.
    """
    table = _table(colormap)
    steps = np.clip(saliency * (len(table) - 1) + 0.5, 0, len(table) - 1)
    coloured: NDArray[np.uint8] = table[steps.astype(np.intp)]
    return coloured


@lru_cache(maxsize=16)
def _table(colormap: str) -> NDArray[np.uint8]:
    require_colormap(colormap)
    from cmap import Colormap

    table = np.asarray(Colormap(f"matlab:{colormap}" if colormap == "jet" else colormap).lut(256))
    scaled: NDArray[np.uint8] = (table[:, :3] * 255 + 0.5).astype(np.uint8)
    return scaled


def heatmap(
    saliency: Floats,
    colormap: str = DEFAULT_COLORMAP,
    bar: bool = False,
    seen: Box | None = None,
) -> Image.Image:
    """Draw a saliency map alone.

    Args:
        saliency: [H, W] float32 in [0, 1].
        colormap: A name among COLORMAPS.
        bar: Add a color bar.
        seen: The part of the map that the network saw. What is outside of it is light grey, and a
            thin frame shows where it ends. None for the whole map.

    Returns:
        An RGB picture, H by W pixels and the color bar.

    Raises:
        OptionError: The color map is unknown.
    """
    picture = Image.fromarray(colours(saliency, colormap))
    if seen is not None and seen != (0, 0, *picture.size):
        picture = _inside(Image.new("RGB", picture.size, _UNSEEN), picture, seen)
    return _with_bar(picture, colormap) if bar else picture


def overlay(
    picture: Image.Image,
    saliency: Floats,
    colormap: str = DEFAULT_COLORMAP,
    opacity: float = 0.5,
    bar: bool = False,
    seen: Box | None = None,
) -> Image.Image:
    """Lay a saliency map over the picture.

    Args:
        picture: The picture, of any mode.
        saliency: [H, W] float32 in [0, 1], of the picture's size.
        colormap: A name among COLORMAPS.
        opacity: How much of the picture the colours hide, in [0, 1].
        bar: Add a color bar.
        seen: The part of the picture that the network saw. Outside of it the picture stays as it
            is, and a thin frame shows where it ends. None for the whole picture.

    Raises:
        OptionError: The map has another size, the opacity is out of range, or the color map is
            unknown.
    """
    if not 0 <= opacity <= 1:
        raise OptionError(f"opacity is {opacity}; it must be in [0, 1]")
    if saliency.shape != (picture.height, picture.width):
        raise OptionError(
            f"the map is {saliency.shape[1]}x{saliency.shape[0]}, "
            f"the picture {picture.width}x{picture.height}"
        )
    base = np.asarray(picture.convert("RGB"), np.float32)
    mixed = base * (1 - opacity) + colours(saliency, colormap).astype(np.float32) * opacity
    result = Image.fromarray((mixed + 0.5).astype(np.uint8))
    if seen is not None and seen != (0, 0, *picture.size):
        result = _inside(picture.convert("RGB"), result, seen)
    return _with_bar(result, colormap) if bar else result


def panel(tiles: Sequence[Tile], height: int = 0) -> Image.Image:
    """Put pictures side by side, each below its caption.

    Args:
        tiles: At least one picture.
        height: The height of every picture in pixels; 0 for that of the tallest, at least 192.

    Raises:
        OptionError: There is no picture.
    """
    return grid([tiles], height)


def grid(rows: Sequence[Sequence[Tile]], height: int = 0) -> Image.Image:
    """Put panels one above another, their pictures in columns.

    Args:
        rows: The pictures of each panel; a panel with fewer than another leaves its end empty.
        height: The height of every picture in pixels; 0 for that of the tallest, at least 192.

    Raises:
        OptionError: There is no picture.
    """
    tiles = [tile for row in rows for tile in row]
    if not tiles:
        raise OptionError("a panel needs at least one picture")
    height = height or max(_SMALLEST_TILE, *(tile.height for _, tile in tiles))
    font = _font(max(12, height // 16))
    scaled = [[(caption, _scaled(tile, height)) for caption, tile in row] for row in rows]
    columns = [
        [row[place] for row in scaled if place < len(row)] for place in range(max(map(len, rows)))
    ]
    widths = [
        max(max(tile.width, _text_width(caption, font)) for caption, tile in column)
        for column in columns
    ]
    top = 2 * _MARGIN + _line_height(font)
    row_height = top + height + _MARGIN
    canvas = Image.new(
        "RGB", (sum(widths) + _MARGIN * (len(widths) + 1), row_height * len(rows)), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for number, row in enumerate(scaled):
        left, upper = _MARGIN, number * row_height
        for (caption, tile), width in zip(row, widths, strict=False):
            draw.text((left, upper + _MARGIN), caption, fill="black", font=font)
            canvas.paste(tile, (left, upper + top))
            left += width + _MARGIN
    return canvas


def boxed(picture: Image.Image, groups: Mapping[Colour, Iterable[Box]]) -> Image.Image:
    """Outline boxes in a picture.

    Small pictures are enlarged first, so that lines hide little of them.

    Args:
        picture: The picture.
        groups: The boxes of each colour; later groups are drawn on top.
    """
    scale = max(1, round(_BOXED_SIDE / max(picture.size)))
    large = picture.convert("RGB").resize((picture.width * scale, picture.height * scale))
    draw = ImageDraw.Draw(large)
    width = max(1, max(large.size) // 200)
    for colour, boxes in groups.items():
        for box in boxes:
            left, top, right, bottom = (side * scale for side in box)
            draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=width)
    return large


def shrunk(picture: Image.Image, saliency: Floats) -> tuple[Image.Image, Floats]:
    """Scale a picture and its map down where a side is longer than 1,024 pixels.

    Args:
        picture: The picture.
        saliency: [H, W] float32, of the picture's size.
    """
    small = thumbnail(picture)
    return small, fitted(saliency, small)


def fitted(saliency: Floats, picture: Image.Image) -> Floats:
    """Bring a map [H, W] float32 of a picture's original size to the size that it is shown at."""
    if saliency.shape == (picture.height, picture.width):
        return saliency
    scaled = Image.fromarray(saliency).resize(picture.size, Image.Resampling.BILINEAR)
    return np.asarray(scaled, dtype=np.float32)


def thumbnail(picture: Image.Image) -> Image.Image:
    """Scale a picture down where a side is longer than 1,024 pixels."""
    longest = max(picture.size)
    if longest <= _LARGEST_SIDE:
        return picture
    scale = _LARGEST_SIDE / longest
    return picture.resize(
        (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    )


def png(picture: Image.Image) -> bytes:
    """Encode a picture as the content of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _scaled(picture: Image.Image, height: int) -> Image.Image:
    return picture.resize((max(round(picture.width * height / picture.height), 1), height))


def _inside(picture: Image.Image, coloured: Image.Image, seen: Box) -> Image.Image:
    """The coloured picture in a box, framed, and the plain one around it."""
    result = picture.copy()
    result.paste(coloured.crop(seen), seen[:2])
    width = max(1, min(picture.size) // _FRAME_SHARE)
    left, top, right, bottom = seen
    ImageDraw.Draw(result).rectangle(
        (left, top, right - 1, bottom - 1), outline="white", width=width
    )
    return result


def _with_bar(picture: Image.Image, colormap: str) -> Image.Image:
    """Add a color bar from 1 at the top to 0 at the bottom."""
    font = _font(max(10, min(picture.height // 12, 40)))
    width = max(8, picture.height // 16)
    label = _text_width("1.0", font)
    canvas = Image.new(
        "RGB", (picture.width + width + label + 3 * _MARGIN, picture.height), "white"
    )
    canvas.paste(picture, (0, 0))
    ramp = np.linspace(1, 0, picture.height, dtype=np.float32)[:, None].repeat(width, axis=1)
    left = picture.width + _MARGIN
    canvas.paste(Image.fromarray(colours(ramp, colormap)), (left, 0))
    draw = ImageDraw.Draw(canvas)
    bottom = picture.height - _line_height(font)
    for text, place in (("1.0", 0), ("0.5", bottom // 2), ("0.0", bottom)):
        draw.text((left + width + _MARGIN, place), text, fill="black", font=font)
    return canvas


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _text_width(text: str, font: Font) -> int:
    return int(font.getbbox(text)[2]) + 1


def _line_height(font: Font) -> int:
    return int(font.getbbox("Hg")[3]) + 1

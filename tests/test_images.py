"""Reading images, making the network's input of them and bringing maps back."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ccam_deploy import image_files
from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.manifest import Interpolation, Preprocessing, Resize
from ccam_deploy.errors import ImageError
from ccam_deploy.image_files import find_images, load_image
from ccam_deploy.preprocess import (
    Geometry,
    input_geometry,
    prepare_images,
    restore_image,
    to_grey_or_rgb,
)
from tests.helpers import SCENES

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def how(
    resize: Resize = "crop",
    cover: tuple[int, int] = (40, 40),
    interpolation: Interpolation = "bilinear",
) -> Preprocessing:
    return Preprocessing(resize, cover, interpolation, MEAN, STD)


def photograph(width: int, height: int) -> Image.Image:
    """A smooth coloured picture."""
    with Image.open(SCENES / "scene-1-digit-9.png") as picture:
        return picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, file_format, **options)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and has no pixels."""
    chunks = b""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        body = name + content
        chunks += struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunks


def transparent_palette() -> Image.Image:
    picture = Image.new("P", (9, 8), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    picture.info["transparency"] = 1
    return picture


@pytest.mark.parametrize(
    ("picture", "colour"),
    [
        (Image.new("RGBA", (9, 8), (10, 20, 30, 0)), (10, 20, 30)),
        (Image.new("LA", (9, 8), (77, 3)), (77, 77, 77)),
        (transparent_palette(), (10, 20, 30)),
        (Image.new("L", (9, 8), 201), (201, 201, 201)),
        (Image.new("1", (9, 8), 1), (255, 255, 255)),
        (Image.new("CMYK", (9, 8), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.fromarray(np.full((8, 9), 128 * 257, np.uint16)), (128, 128, 128)),
        (Image.fromarray(np.full((8, 9), 65535, np.int32)), (255, 255, 255)),
        (Image.fromarray(np.full((8, 9), 0.5, np.float32)), (128, 128, 128)),
        (Image.new("LAB", (9, 8), (0, 128, 128)), (0, 0, 0)),
        (Image.new("La", (9, 8), (77, 255)), (77, 77, 77)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_modes_become_colours(picture: Image.Image, colour: tuple[int, int, int]) -> None:
    rgb = to_grey_or_rgb(picture, 3)
    assert (rgb.mode, rgb.size) == ("RGB", (9, 8))
    np.testing.assert_allclose(np.asarray(rgb)[4, 4].astype(int), colour, atol=1)
    grey = to_grey_or_rgb(picture, 1)
    assert grey.mode == "L"
    assert grey.getpixel((4, 4)) == rgb.convert("L").getpixel((4, 4))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_range(file_format: str) -> None:
    wide = np.linspace(0, 65535, 96, dtype=np.uint16).reshape(8, 12)
    picture = load_image(encoded(Image.fromarray(wide), file_format))
    np.testing.assert_array_equal(to_grey_or_rgb(picture, 1), wide // 257)


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_palettes_with_transparency_are_read(file_format: str) -> None:
    picture = load_image(encoded(transparent_palette(), file_format, transparency=1))
    assert picture.mode == "P"
    assert to_grey_or_rgb(picture, 3).getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "NaN or infinite pixels"),
        (np.inf, "NaN or infinite pixels"),
        (1.5, r"outside \[0, 1\]; scale them first"),
        (-0.1, r"outside \[0, 1\]; scale them first"),
    ],
)
def test_unusable_floating_point_pixels(value: float, message: str) -> None:
    pixels = np.full((8, 8), 0.5, np.float32)
    pixels[3, 4] = value
    picture = load_image(encoded(Image.fromarray(pixels), "TIFF"))
    with pytest.raises(ImageError, match=message):
        prepare_images([picture], (8, 8), how("stretch"))


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-1, 65535), (0, 65536)])
def test_wide_pixels_of_another_range(low: int, high: int) -> None:
    pixels = np.linspace(low, high, 64).reshape(8, 8).astype(np.int32)
    picture = load_image(encoded(Image.fromarray(pixels), "TIFF"))
    with pytest.raises(
        ImageError, match=f"32-bit pixels of {low} to {high}, which are taken as 16"
    ):
        prepare_images([picture], (8, 8), how("stretch"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(orientation: int) -> None:
    """The EXIF standard's table: where row 0 and column 0 of the stored pixels are shown."""
    shown = np.zeros((24, 16), np.uint8)
    shown[:12, :8], shown[:12, 8:], shown[12:, :8] = 250, 170, 90
    stored = {
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.T,
        6: shown.T[::-1],
        7: shown.T[::-1, ::-1],
        8: shown.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), "JPEG", exif=exif, quality=95)
    turned = load_image(content)
    assert turned.size == (16, 24)
    np.testing.assert_allclose(np.asarray(turned, dtype=np.int64), shown, atol=6)
    assert turned.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("orientation", [1, 6])
def test_pictures_of_pillow_are_turned_too(orientation: int) -> None:
    """Opened by the caller, so neither decoded nor turned; the caller's picture stays as it is."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photograph(48, 32), "JPEG", exif=exif)
    expected = prepare_images([load_image(content)], (32, 48), how("stretch"))
    with Image.open(io.BytesIO(content)) as picture:
        got = prepare_images([picture], (32, 48), how("stretch"))
        assert picture.size == (48, 32)
    np.testing.assert_array_equal(got[0], expected[0])
    assert got[1] == expected[1]
    assert got[1][0].original == ((32, 48) if orientation == 1 else (48, 32))


def test_truncated_pictures_of_pillow_are_refused() -> None:
    picture = Image.open(io.BytesIO(encoded(photograph(64, 64), "JPEG")[:900]))
    with pytest.raises(ImageError, match=r"^the image cannot be decoded: .*truncate"):
        prepare_images([picture], (32, 32), how())


BAD_CONTENT = {
    "truncated": (encoded(photograph(64, 64), "JPEG")[:900], "image cannot be decoded: .*truncate"),
    "text": (b"this is no image at all", r"image is not an image of a known format \(JPEG, PNG"),
    "empty": (b"", "image is not an image of a known format"),
    "icon": (encoded(photograph(32, 32), "ICO"), "image is not an image of a known format"),
    "postscript": (encoded(photograph(32, 32), "EPS"), "image is not an image of a known format"),
    "bomb": (
        png_header(60_000, 60_000),
        "image has 3600000000 pixels, more than 100000000; scale it down first$",
    ),
    "huge": (png_header(10_100, 10_000), "image is 10100x10000, more than 100000000 pixels"),
    "hollow": (png_header(100, 100), "image cannot be decoded: "),
    "flat": (encoded(photograph(90, 7)), "image is 90x7; both sides must be at least 8"),
}


def with_scans(content: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    start = content.rindex(b"\xff\xda")
    return content[:start] + content[start:-2] * count + content[-2:]


def test_a_jpeg_of_many_scans_is_refused() -> None:
    """It would take minutes: each scan of a few bytes is a pass over the whole picture."""
    file = io.BytesIO()
    photograph(64, 64).save(file, "JPEG", progressive=True)
    assert load_image(with_scans(file.getvalue(), 80)).size == (64, 64)
    with pytest.raises(
        ImageError, match=r"^image is a JPEG of more than 100 scans; save it again$"
    ):
        load_image(with_scans(file.getvalue(), 120))


def test_threads_that_read_images_leave_warnings_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first to begin ends before the second."""
    content = encoded(photograph(20, 20))
    begun, go_on = threading.Event(), threading.Event()
    other = threading.Thread(target=load_image, args=[content])
    shown = image_files.as_shown

    def one_in_the_other(picture: Image.Image) -> Image.Image:
        if threading.current_thread() is other:
            begun.set()
            assert go_on.wait(10)
        else:
            other.start()
            assert begun.wait(10)
            warnings.warn_explicit("a tag", UserWarning, "Image.py", 1, "PIL.Image")
            with pytest.raises(UserWarning, match="another's"):
                warnings.warn_explicit("another's", UserWarning, "other.py", 1, "other")
        return shown(picture)

    monkeypatch.setattr(image_files, "as_shown", one_in_the_other)
    before = list(warnings.filters)
    load_image(content)
    go_on.set()
    other.join()
    assert list(warnings.filters) == before


@pytest.mark.parametrize(("content", "message"), BAD_CONTENT.values(), ids=BAD_CONTENT)
def test_bad_content_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=f"^{message}"):
        load_image(content)


def test_content_is_bounded_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.png"
    path.write_bytes(encoded(photograph(20, 20)))
    monkeypatch.setattr(image_files, "MAX_BYTES", 50)
    with pytest.raises(ImageError, match=r"long\.png has more than 50 bytes"):
        load_image(path)
    with pytest.raises(ImageError, match=r"upload has \d+ bytes, more than 50"):
        load_image(path.read_bytes(), "upload")


@pytest.mark.parametrize("drawn", [(1024, 1), (1, 1024), (1, 1)])
def test_at_least_a_pixel_was_seen_of_a_small_drawing(drawn: tuple[int, int]) -> None:
    """Of a picture that is very long and narrow, drawn small."""
    for size, scaled, corner in (
        ((8, 12000), (256, 384000), (16, 191888)),
        ((12000, 8), (384000, 256), (191888, 16)),
    ):
        left, top, right, bottom = Geometry(size, scaled, corner, (224, 224)).seen_in(drawn)
        assert 0 <= left < right <= drawn[0]
        assert 0 <= top < bottom <= drawn[1]


def test_unreadable_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.png cannot be read: No such file"):
        load_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="is not a file"):
        load_image(tmp_path)


def test_folders_are_searched_in_order(tmp_path: Path) -> None:
    for name in ("b.PNG", "a/z.jpeg", "a/notes.txt", "a.jpg/c.webp"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    alone = tmp_path / "a" / "notes.txt"
    found = [path.relative_to(tmp_path).as_posix() for path in find_images([alone, tmp_path])]
    assert found == ["a/notes.txt", "a/z.jpeg", "a.jpg/c.webp", "b.PNG"]


def test_hidden_files_are_left_out_and_broken_links_are_not(tmp_path: Path) -> None:
    for name in (".hidden.jpg", "._a.jpg", ".thumbnails/a.jpg", "a/.b/c.png", "a/b.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    found = [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path])]
    assert found == ["a/b.png", "link.png"]
    assert find_images([tmp_path / ".hidden.jpg"]) == [tmp_path / ".hidden.jpg"]


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"holds no images \(\.jpg, \.jpeg, "):
        find_images([tmp_path])
    with pytest.raises(ImageError, match=r"none\.png does not exist"):
        find_images([tmp_path / "none.png"])
    with pytest.raises(ImageError, match=r"/n+: File name too long$"):
        find_images([tmp_path / ("n" * 300)])


@pytest.mark.parametrize(
    ("picture_size", "size", "cover"),
    [
        ((97, 61), (32, 32), (40, 40)),
        ((61, 97), (32, 32), (40, 40)),
        ((40, 180), (224, 224), (224, 224)),
        ((20, 31), (32, 48), (37, 55)),
        ((200, 30), (31, 17), (36, 20)),
    ],
)
def test_crop_is_torchvisions(
    picture_size: tuple[int, int], size: tuple[int, int], cover: tuple[int, int]
) -> None:
    """Scale the side that falls short to its cover, the other by int(); cut the middle out."""
    picture = photograph(*picture_size)
    got, (geometry,) = prepare_images([picture], size, how(cover=cover))
    width, height = picture_size
    if cover[0] / height > cover[1] / width:
        scaled = (int(cover[0] * width / height), cover[0])
    else:
        scaled = (cover[1], int(cover[1] * height / width))
    pixels = np.asarray(picture.resize(scaled, Image.Resampling.BILINEAR), np.float64) / 255
    top = round((scaled[1] - size[0]) / 2)
    left = round((scaled[0] - size[1]) / 2)
    expected = (pixels[top : top + size[0], left : left + size[1]] - MEAN) / STD
    np.testing.assert_allclose(got[0], expected.transpose(2, 0, 1), atol=1e-5)
    assert geometry == Geometry((height, width), scaled[::-1], (top, left), size)


def test_stretch_ignores_the_shape() -> None:
    picture = photograph(97, 30)
    got, (geometry,) = prepare_images([picture], (32, 48), how("stretch", interpolation="bicubic"))
    pixels = np.asarray(picture.resize((48, 32), Image.Resampling.BICUBIC), np.float64) / 255
    np.testing.assert_allclose(got[0], ((pixels - MEAN) / STD).transpose(2, 0, 1), atol=1e-5)
    assert geometry == Geometry((30, 97), (32, 48), (0, 0), (32, 48))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_preprocessed_image_is_restored(channels: int) -> None:
    """Exactly, where nothing was scaled."""
    colours = to_grey_or_rgb(photograph(40, 30), channels)
    means, stds = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    settings = Preprocessing("stretch", (40, 30), "bilinear", means, stds)
    batch, _ = prepare_images([colours], colours.size[::-1], settings)
    shown = restore_image(batch[0], means, stds)
    assert shown.mode == colours.mode
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(colours))


def test_grey_networks_get_one_channel() -> None:
    picture = photograph(40, 40)
    got, _ = prepare_images(
        [picture], (40, 40), Preprocessing("stretch", (40, 40), "bilinear", (0.5,), (0.5,))
    )
    grey = np.asarray(picture.convert("L"), np.float64)
    np.testing.assert_allclose(got, (grey[None, None] / 255 - 0.5) / 0.5, atol=1e-6)


def test_pictures_that_no_input_can_be_made_of() -> None:
    with pytest.raises(ImageError, match="the image is 7x60; both sides must be at least 8"):
        prepare_images([photograph(7, 60)], (32, 32), how())
    narrow = Image.new("1", (3_000_000, 8))
    with pytest.raises(ImageError, match="too long and narrow: scaled to 15000000x40 it has more"):
        prepare_images([narrow], (32, 32), how())
    four = Preprocessing("crop", (40, 40), "bilinear", (0.5,) * 4, (0.5,) * 4)
    with pytest.raises(ImageError, match="takes 4 channels, images have 1 or 3; give an array"):
        prepare_images([photograph(60, 60)], (32, 32), four)


def blob_in_input(picture: Image.Image, size: tuple[int, int], how: Preprocessing) -> Floats:
    """The map of the input that marks what is light in it, and where it lies in the original."""
    images, (geometry,) = prepare_images([picture], size, how)
    light = images[0, 0] * how.std[0] + how.mean[0] > 0.5
    return geometry.to_original(light.astype(np.float32))


@pytest.mark.parametrize(
    "preprocessing", [how(cover=(40, 40)), how("stretch")], ids=["crop", "stretch"]
)
@pytest.mark.parametrize("picture_size", [(160, 90), (90, 160), (30, 24)])
def test_maps_return_to_their_place(
    preprocessing: Preprocessing, picture_size: tuple[int, int]
) -> None:
    """A light rectangle, found in the input, is back where it was, but for its soft edge."""
    width, height = picture_size
    pixels = np.zeros((height, width, 3), np.uint8)
    rows, columns = slice(height // 3, height // 2), slice(width // 2, 2 * width // 3)
    pixels[rows, columns] = 255
    returned = blob_in_input(Image.fromarray(pixels), (32, 32), preprocessing)
    assert returned.shape == (height, width)
    y, x = np.argwhere(returned > 0.5).T
    reach = 1 + max(height, width) / 32
    np.testing.assert_allclose([y.min(), y.max() + 1], [rows.start, rows.stop], atol=reach)
    np.testing.assert_allclose([x.min(), x.max() + 1], [columns.start, columns.stop], atol=reach)


def test_maps_are_zero_outside_the_crop() -> None:
    geometry = Geometry((100, 300), (50, 150), (5, 55), (40, 40))
    returned = geometry.to_original(np.ones((40, 40), np.float32))
    inside = np.zeros((100, 300), bool)
    inside[10:90, 110:190] = True
    assert (returned[12:88, 112:188] == 1).all()
    assert not returned[:8].any()
    assert not returned[:, :108].any()
    assert not returned[:, 192:].any()
    np.testing.assert_array_equal(returned >= 0.5, inside)


def test_maps_of_turned_images_fit_what_is_shown() -> None:
    """A phone's portrait: stored on its side, shown, explained and marked upright."""
    shown = np.zeros((120, 80), np.uint8)
    shown[30:60, 20:40] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.ascontiguousarray(shown.T[::-1]))
    picture = load_image(encoded(stored, "JPEG", exif=exif, quality=95))
    returned = blob_in_input(picture, (32, 32), how())
    y, x = np.argwhere(returned > 0.5).T
    np.testing.assert_allclose([y.min(), y.max(), x.min(), x.max()], [30, 59, 20, 39], atol=4)


def test_maps_of_another_size_are_refused() -> None:
    geometry = Geometry((10, 10), (10, 10), (0, 0), (10, 10))
    with pytest.raises(ImageError, match=r"the map is \[4, 5\], the input \[10, 10\]"):
        geometry.to_original(np.zeros((4, 5), np.float32))


def test_boxes_come_to_the_input_by_hand() -> None:
    """100×200 scaled to 40×80, the middle 40×40 taken: left is x·0.4 − 20."""
    place = input_geometry((100, 200), (40, 40), how())
    assert (place.scaled, place.corner) == ((40, 80), (0, 20))
    boxes = [[60, 10, 100, 50], [0, 0, 200, 100], [0, 0, 50, 100], [0, 0, 49, 10], [150, 0, 200, 9]]
    got = place.to_input(np.array(boxes, np.float64))
    np.testing.assert_allclose(got, [[4, 4, 20, 20], [0, 0, 40, 40]])
    assert place.to_input(np.zeros((0, 4))).shape == (0, 4)
    stretched = input_geometry((100, 200), (40, 40), how("stretch"))
    got = stretched.to_input(np.array([[50.0, 10, 100, 50]]))
    np.testing.assert_allclose(got, [[10, 4, 20, 20]])


@pytest.mark.parametrize("size", [(120, 90), (61, 173), (200, 200)], ids=str)
@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_boxes_meet_the_pixels_they_had(resize: Resize, size: tuple[int, int]) -> None:
    """A white rectangle on black, prepared as an image, lies where its box is brought to."""
    height, width = size
    box = (width // 2 - 13, height // 2 - 9, width // 2 + 20, height // 2 + 14)
    picture = Image.new("RGB", (width, height))
    picture.paste((255, 255, 255), box)
    batch, (place,) = prepare_images([picture], (40, 40), how(resize))
    white = batch[0, 0] * STD[0] + MEAN[0] > 0.5
    rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
    seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    got = place.to_input(np.array([box], np.float64))[0]
    np.testing.assert_allclose(got, seen, atol=0.75)


def test_threads_prepare_what_one_does() -> None:
    """The same bits in the same order; a picture that comes twice is decoded by one thread."""
    pictures = [photograph(60 + 5 * n, 50) for n in range(7)]
    streams = [io.BytesIO(encoded(picture)) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        lazy = [Image.open(stream) for stream in streams]
        for group in (pictures, lazy, [lazy[0], lazy[1], lazy[0]]):
            batch, places = prepare_images(group, (40, 40), how(), pool)
            expected, expected_places = prepare_images(group, (40, 40), how())
            assert batch.tobytes() == expected.tobytes()
            assert places == expected_places
        with pytest.raises(ImageError, match=r"too narrow|at least 8"):
            prepare_images([*pictures, Image.new("RGB", (1, 1))], (40, 40), how(), pool)

"""From pictures to the network's input, and from maps back to the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image

from ccam_deploy.arrays import Doubles, Floats
from ccam_deploy.bundle.manifest import Manifest, Preprocessing
from ccam_deploy.errors import ImageError, brief
from ccam_deploy.image_files import MAX_PIXELS, as_shown, load_image, require_usable_size

_VIA = {"P": "RGBA", "PA": "RGBA", "La": "LA", "LAB": "RGB"}


@dataclass(frozen=True)
class Geometry:
    """Place of the network's input in the original image; all sizes are height, width in pixels.

    Attributes:
        original: Size of the image, turned as its EXIF data says.
        scaled: Size of the image after scaling.
        corner: Top, left of the input inside the scaled image.
        size: Size of the network's input.
    """

    original: tuple[int, int]
    scaled: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]

    def seen_in(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Find the part of the picture that the network saw.

        Args:
            size: Width, height of the picture as it is drawn; the original's size or another.

        Returns:
            left, top, right, bottom in pixels, right and bottom exclusive; at least a pixel.
        """
        scale = np.divide(size[::-1], self.scaled)
        start = np.maximum(self.corner, 0)
        end = np.minimum(np.add(self.corner, self.size), self.scaled)
        first = np.minimum(np.floor(start * scale + 0.5), np.subtract(size[::-1], 1))
        top, left = first.astype(int).tolist()
        bottom, right = np.maximum(np.floor(end * scale + 0.5), first + 1).astype(int).tolist()
        return left, top, right, bottom

    def to_original(self, saliency: Floats) -> Floats:
        """Bring a map of the input back to the original image.

        Args:
            saliency: [H, W] float32, of the input's size.

        Returns:
            [height, width] float32 of the original's size, 0 where the network saw nothing.

        Raises:
            ImageError: The map has another size.
        """
        if saliency.shape != self.size:
            raise ImageError(f"the map is {list(saliency.shape)}, the input {list(self.size)}")
        height, width = self.scaled
        top, left = (max(offset, 0) for offset in self.corner)
        canvas = np.zeros((height, width), np.float32)
        canvas[top : top + self.size[0], left : left + self.size[1]] = saliency
        shown = Image.fromarray(canvas).resize(
            (self.original[1], self.original[0]), Image.Resampling.BILINEAR
        )
        return np.asarray(shown, dtype=np.float32)

    def to_input(self, boxes: Doubles) -> Doubles:
        """Bring boxes of the original image to the input, cut at its border.

        Args:
            boxes: [K, 4] float64: left, top, right, bottom in pixels, right and bottom exclusive.

        Returns:
            [L, 4] float64, without the boxes of which nothing is left in the input.
        """
        scale = np.divide(self.scaled, self.original)
        top, left = self.corner
        moved = boxes * [*scale[::-1], *scale[::-1]] - [left, top, left, top]
        height, width = self.size
        cut = np.clip(moved, 0, [width, height, width, height])
        kept: Doubles = cut[(cut[:, 2] > cut[:, 0]) & (cut[:, 3] > cut[:, 1])]
        return kept


@dataclass(frozen=True)
class Source:
    """The images that were explained, by reference, and the bundle's facts about them.

    Attributes:
        manifest: The bundle's manifest.
        images: B PIL images, or [B, C, H, W] float32.
        geometries: Where each image's input lies in the picture; empty for an array.
    """

    manifest: Manifest
    images: Floats | Sequence[Image.Image]
    geometries: tuple[Geometry, ...]

    def picture(self, image: int) -> Image.Image:
        """Give an image as an RGB picture, restored where an array was explained."""
        if not isinstance(self.images, np.ndarray):
            return to_grey_or_rgb(as_shown(self.images[image]), 3)
        how = self.manifest.preprocessing
        return restore_image(self.images[image], how.mean, how.std).convert("RGB")

    def network_input(self, image: int) -> Floats:
        """Give an image as the network gets it, [C, H, W] float32."""
        row: Floats
        if isinstance(self.images, np.ndarray):
            row = self.images[image]
            return row
        size, how = self.manifest.input[1:], self.manifest.preprocessing
        prepared, _ = prepare_images([self.images[image]], size, how)
        row = prepared[0]
        return row

    def take(self, images: Sequence[int]) -> Source:
        """Keep some of the images."""
        if isinstance(self.images, np.ndarray):
            kept: Floats | Sequence[Image.Image] = self.images[list(images)]
        else:
            kept = [self.images[image] for image in images]
        places = tuple(self.geometries[image] for image in images) if self.geometries else ()
        return Source(self.manifest, kept, places)


@dataclass(frozen=True)
class UnkeptSource(Source):
    """Facts about images that lay in a GPU's memory for the time of a call, and cannot be drawn."""

    def picture(self, image: int) -> Image.Image:
        """Raise ImageError; see Source."""
        raise _unkept()

    def network_input(self, image: int) -> Floats:
        """Raise ImageError; see Source."""
        raise _unkept()

    def take(self, images: Sequence[int]) -> Source:
        """Keep the facts; see Source."""
        return self


def _unkept() -> ImageError:
    return ImageError("the images were in a GPU's memory for the time of the call only")


def read_picture(source: Path | bytes, manifest: Manifest, name: str) -> Image.Image:
    """Read an image file as an RGB picture that a bundle's network can take.

    Args:
        source: The file, or its bytes.
        manifest: The bundle's.
        name: What messages call it.

    Raises:
        ImageError: The file cannot be read, or the network cannot take it; it is named.
    """
    picture = load_image(source, name)
    try:
        input_geometry(picture.size[::-1], manifest.input[1:], manifest.preprocessing)
        return to_grey_or_rgb(picture, 3)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error


def to_grey_or_rgb(picture: Image.Image, channels: int) -> Image.Image:
    """Convert an image of any mode to 8-bit grey or RGB; transparency is dropped.

    16-bit pixels are scaled by their full range, as are 32-bit ones that look like them;
    floating-point pixels are taken as [0, 1].

    Args:
        picture: The image.
        channels: 1 for grey, 3 for RGB.

    Raises:
        ImageError: Floating-point pixels are not finite or outside [0, 1], or 32-bit ones are
            those of 8 bits, negative or above 16 bits.
    """
    if picture.mode.startswith("I"):
        wide = np.asarray(picture)
        low, high = int(wide.min()), int(wide.max())
        if picture.mode == "I" and not (low >= 0 and 255 < high <= 65535):
            raise ImageError(
                f"the image has 32-bit pixels of {low} to {high}, which are taken as 16 bits; "
                "save it with 8 or 16 bits"
            )
        picture = Image.fromarray((wide // 257).astype(np.uint8))
    elif picture.mode == "F":
        values = np.asarray(picture)
        if not np.isfinite(values).all():
            raise ImageError("the image has NaN or infinite pixels")
        if values.min() < 0 or values.max() > 1:
            raise ImageError("the image has floating-point pixels outside [0, 1]; scale them first")
        picture = Image.fromarray((values * 255 + 0.5).astype(np.uint8))
    elif picture.mode in _VIA:
        picture = picture.convert(_VIA[picture.mode])
    return picture.convert("L" if channels == 1 else "RGB")


def prepare_images(
    pictures: Sequence[Image.Image],
    size: tuple[int, int],
    how: Preprocessing,
    pool: Executor | None = None,
) -> tuple[Floats, tuple[Geometry, ...]]:
    """Turn, scale, crop and normalise images for the network.

    Args:
        pictures: B images, which are turned as their EXIF data says.
        size: Height, width of the input.
        how: How they are scaled, cropped and normalised.
        pool: Threads that take an image each; None for the caller's alone.

    Returns:
        [B, C, H, W] float32, and each image's geometry.

    Raises:
        ImageError: An image is too small, too narrow, truncated or has unusable pixels.
    """
    if len(how.mean) not in (1, 3):
        raise ImageError(
            f"the network takes {len(how.mean)} channels, images have 1 or 3; give an array"
        )
    batch = np.empty((len(pictures), len(how.mean), *size), np.float32)
    if pool is None or len(set(map(id, pictures))) < len(pictures):  # Pillow decodes on first use
        return batch, tuple(map(_prepare_image, batch, pictures, repeat(how)))
    return batch, tuple(pool.map(_prepare_image, batch, pictures, repeat(how)))


def _prepare_image(row: Floats, picture: Image.Image, how: Preprocessing) -> Geometry:
    """Write a picture to a row [C, H, W] of the batch; return its geometry."""
    channels, height, width = row.shape
    require_usable_size(picture, "the image")
    try:
        turned = as_shown(picture)
    except Exception as error:
        raise ImageError(f"the image cannot be decoded: {brief(error)}") from error
    place = input_geometry((turned.height, turned.width), (height, width), how)
    coloured = to_grey_or_rgb(turned, channels)
    scaled = coloured.resize(
        (place.scaled[1], place.scaled[0]), Image.Resampling[how.interpolation.upper()]
    )
    top, left = place.corner
    cropped = scaled.crop((left, top, left + width, top + height))
    pixels = np.asarray(cropped, dtype=np.float32).reshape(height, width, -1).transpose(2, 0, 1)
    mean = np.array(how.mean, np.float32)[:, None, None]
    std = np.array(how.std, np.float32)[:, None, None]
    row[:] = (pixels / np.float32(255) - mean) / std
    return place


def restore_image(image: Floats, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """Undo the normalisation of an image.

    Args:
        image: [C, H, W] float32, preprocessed; C is 1 or 3.
        mean: Per channel, of pixels in [0, 1], that it was normalised with.
        std: Per channel, of pixels in [0, 1], that it was normalised with.

    Returns:
        A grey or RGB picture.
    """
    offset, scale = (np.array(values, np.float32)[:, None, None] for values in (mean, std))
    pixels = np.clip((image * scale + offset) * 255 + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def input_geometry(
    original: tuple[int, int], size: tuple[int, int], how: Preprocessing
) -> Geometry:
    """Find the place of the network's input in an image.

    Args:
        original: Height, width of the image.
        size: Height, width of the input.
        how: How images are scaled and cropped.

    Raises:
        ImageError: The image is too long and narrow to be scaled.
    """
    if how.resize == "stretch":
        return Geometry(original, size, (0, 0), size)
    height, width = original
    cover = how.cover
    if cover[0] * width >= cover[1] * height:
        scaled = (cover[0], cover[0] * width // height)
    else:
        scaled = (cover[1] * height // width, cover[1])
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise ImageError(
            f"the image is {width}x{height}, too long and narrow: "
            f"scaled to {scaled[1]}x{scaled[0]} it has more than {MAX_PIXELS} pixels"
        )
    corner = (round((scaled[0] - size[0]) / 2), round((scaled[1] - size[1]) / 2))
    return Geometry(original, scaled, corner, size)

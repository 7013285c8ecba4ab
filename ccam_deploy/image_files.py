"""Image files: found in folders, and read safely."""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from ccam_deploy.errors import ImageError, brief

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm")
MAX_BYTES = 256 * 2**20
MAX_PIXELS = 100_000_000
MIN_SIDE = 8
MAX_SCANS = 100
"""Of a progressive JPEG, which is decoded once more for each; encoders write 6 to 18."""

_SCAN = b"\xff\xda"


def load_image(
    source: str | Path | bytes, name: str = "", formats: tuple[str, ...] = IMAGE_FORMATS
) -> Image.Image:
    """Read an image and turn it as its EXIF data says.

    Args:
        source: The image file, or its bytes.
        name: The image's name in messages; by default the file's.
        formats: Names of formats that it may have, among IMAGE_FORMATS.

    Raises:
        ImageError: It is no image, truncated, too large or too small, a JPEG that would take far
            longer than others of its size, or of another format.
    """
    name = name or ("image" if isinstance(source, bytes) else str(source))
    content = source if isinstance(source, bytes) else _read(Path(source))
    if len(content) > MAX_BYTES:
        raise ImageError(f"{name} has {len(content)} bytes, more than {MAX_BYTES}")
    try:
        with _without_pillows_warnings:
            picture = Image.open(io.BytesIO(content), formats=formats)
            require_usable_size(picture, name)
            _require_few_scans(picture, content, name)
            turned = as_shown(picture)
    except UnidentifiedImageError as error:
        known = ", ".join(formats)
        raise ImageError(f"{name} is not an image of a known format ({known})") from error
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))  # Pillow tells the size nowhere else
        count = f"{pixels[0]} pixels, " if pixels else ""
        raise ImageError(
            f"{name} has {count}more than {MAX_PIXELS}; scale it down first"
        ) from error
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{name} cannot be decoded: {brief(error)}") from error
    return turned


class _PillowsWarnings:
    """Ignores Pillow's warnings while any thread reads an image.

    Python's filters are the whole process's: a thread that put back what it found would put back
    what another had set for a while.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._readers:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._readers += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._readers -= 1
            if not self._readers:
                self._filters.__exit__(None, None, None)


_without_pillows_warnings = _PillowsWarnings()


def as_shown(picture: Image.Image) -> Image.Image:
    """Read a picture's pixels and turn them as its EXIF data says."""
    picture.load()
    turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(picture) if turned else picture


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise ImageError(f"{path} is not a file")
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise ImageError(f"{path} has more than {MAX_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error


def _require_few_scans(picture: Image.Image, content: bytes, name: str) -> None:
    """Refuse a JPEG of a few kilobytes that would take minutes."""
    if isinstance(picture, JpegImageFile) and content.count(_SCAN) > MAX_SCANS:
        raise ImageError(f"{name} is a JPEG of more than {MAX_SCANS} scans; save it again")


def require_usable_size(picture: Image.Image, name: str) -> None:
    """Refuse a picture that is too large or too small.

    Args:
        picture: The picture; its pixels need not be read.
        name: The picture's name, for the message.

    Raises:
        ImageError: It has more than MAX_PIXELS pixels, or fewer than MIN_SIDE along a side.
    """
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} is {width}x{height}, more than {MAX_PIXELS} pixels; scale it down first"
        )
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{name} is {width}x{height}; both sides must be at least {MIN_SIDE}")


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """List image files.

    Args:
        paths: Files, and folders that are searched with all their subfolders, but for what is
            hidden there, whose name begins with a dot.

    Returns:
        The files as they are named, and those of each folder sorted.

    Raises:
        ImageError: A path does not exist or cannot be read, or a folder holds no images.
    """
    return [file for path in map(Path, paths) for file in _images_at(path)]


def is_image(path: Path, folder: Path) -> bool:
    """Whether a path in a folder is named like an image, is not hidden, and is a file or was one.

    A link to what is not there is one: to leave it out would hide that.
    """
    if is_hidden(path, folder) or path.suffix.lower() not in IMAGE_SUFFIXES:
        return False
    return path.is_file() or not path.exists()


def is_hidden(path: Path, folder: Path) -> bool:
    """Whether a path in a folder, or what lies on the way to it, has a dot before its name."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _images_at(path: Path) -> list[Path]:
    """A file that exists, or the images of a folder."""
    try:
        if path.is_dir():
            inside = sorted(inner for inner in path.rglob("*") if is_image(inner, path))
            if not inside:
                raise ImageError(f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)})")
            return inside
        if not path.exists():
            raise ImageError(f"{path} does not exist")
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    return [path]

"""Draw the README's pictures: photographs with their maps, and the maps of several methods.

    python -m bench.draw_photographs engines/efficientnet_lite0 --output docs/images

Writes photographs.jpg, the example photographs under the map of each one's best class, and
methods.jpg, some of them with the maps of several methods.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

import ccam_deploy as ccam
from ccam_deploy.files import write_file
from ccam_deploy.image_files import find_images, load_image
from ccam_deploy.methods import Method
from ccam_deploy.render import Tile, grid

PHOTOGRAPHS = Path(__file__).parents[1] / "export" / "examples"
COLUMNS = 4
COMPARED = ("cat", "officer", "espresso")
METHODS: Mapping[str, Method] = {
    "Collection-CAM": ccam.CollectionCAM(),
    "Grad-CAM": ccam.GradCAM(),
    "Layer-CAM": ccam.LayerCAM(),
    "Score-CAM": ccam.ScoreCAM(),
    "RISE": ccam.RISE(masks=1000),
}
QUALITY = 88


def square(picture: Image.Image) -> Image.Image:
    """Cut the largest square out of a picture's middle."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def overview(explainer: ccam.Explainer, pictures: Sequence[Image.Image]) -> Image.Image:
    """Draw each picture under the map of its best class, with the class and its probability."""
    result = explainer.explain(pictures)
    tiles = [(_caption(pair), pair.overlay()) for pair in result]
    rows = [tiles[first : first + COLUMNS] for first in range(0, len(tiles), COLUMNS)]
    return grid(rows, height=200)


def comparison(
    explainer: ccam.Explainer, pictures: Sequence[Image.Image], methods: Mapping[str, Method]
) -> Image.Image:
    """Draw a row for each picture: the picture, and its best class's map by each method."""
    return grid([list(_row(explainer, picture, methods)) for picture in pictures], height=130)


def _row(
    explainer: ccam.Explainer, picture: Image.Image, methods: Mapping[str, Method]
) -> Iterator[Tile]:
    results = {name: explainer.explain(picture, method=method) for name, method in methods.items()}
    yield _caption(next(iter(results.values()))), picture
    for name, result in results.items():
        yield name, result.overlay()


def _caption(result: ccam.Explanation) -> str:
    return f"{result.labels[0]} {result.probability():.2f}"


def jpeg(picture: Image.Image) -> bytes:
    """Encode a picture as the content of a JPEG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    pictures = {path.stem: square(load_image(path)) for path in find_images([PHOTOGRAPHS])}
    with ccam.load(arguments.bundle) as explainer:
        drawn = {
            "photographs": overview(explainer, list(pictures.values())),
            "methods": comparison(explainer, [pictures[name] for name in COMPARED], METHODS),
        }
    for name, picture in drawn.items():
        write_file(arguments.output / f"{name}.jpg", jpeg(picture))
        print(arguments.output / f"{name}.jpg")


if __name__ == "__main__":
    main()

"""The photographs in the package may be shared because their authors are named beside them."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from ccam_deploy.examples import photographs

FOLDER = resources.files(photographs)
NAMES = sorted(file.name for file in FOLDER.iterdir() if file.name.endswith(".jpg"))


def test_the_package_brings_photographs() -> None:
    assert NAMES == ["china.jpg", "flower.jpg"]
    assert [picture.size for picture in photographs.photographs()] == [(320, 320)] * 2


@pytest.mark.parametrize("name", NAMES)
def test_each_photograph_is_attributed(name: str) -> None:
    text = (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith(f"| `{name}`"))
    author, source = re.findall(r"https://www\.flickr\.com/photos/(\w+)/(\d*)", row)
    assert author[0] == source[0]
    assert f"[{author[0]}]" in row
    assert source[1]
    assert "https://creativecommons.org/licenses/by/2.0/" in text

"""Photographs for checks on real images; their sources and licences stand in ATTRIBUTION.md."""

from __future__ import annotations

from importlib import resources

from PIL import Image

from ccam_deploy.image_files import load_image


def photographs() -> list[Image.Image]:
    """The photographs that the package brings for checks on real images."""
    files = (f for f in resources.files(__name__).iterdir() if f.name.endswith(".jpg"))
    ordered = sorted(files, key=lambda file: file.name)
    return [load_image(file.read_bytes(), file.name) for file in ordered]

"""From a PyTorch classifier to a bundle. The only part of the package that imports torch."""

from ccam_deploy.export.exporter import ExportSettings, export
from ccam_deploy.export.recipe import Recipe

__all__ = ["ExportSettings", "Recipe", "export"]

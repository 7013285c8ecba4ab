"""From a PyTorch classifier to a bundle. The only part of the package that imports torch."""

from ccam_deploy.export.exporter import export
from ccam_deploy.export.recipe import Recipe
from ccam_deploy.export.settings import ExportSettings

__all__ = ["ExportSettings", "Recipe", "export"]

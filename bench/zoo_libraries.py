"""Imports the libraries of networks that are installed, once for all processes of bench_zoo."""

from contextlib import suppress

from ccam_deploy.errors import SourceError
from ccam_deploy.export.architecture import import_module

for library in ("timm", "torchvision.models"):
    with suppress(SourceError):
        import_module(library)

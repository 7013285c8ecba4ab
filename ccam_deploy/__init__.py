"""Explanations of image classifiers at inference speed, without PyTorch at run time.

import ccam_deploy as ccam
explainer = ccam.load("engines/digits")
result = explainer.explain(images)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ccam_deploy.bundle.folder import Bundle
    from ccam_deploy.bundle.manifest import Manifest
    from ccam_deploy.errors import CcamError
    from ccam_deploy.explainer import Explainer, load
    from ccam_deploy.explanation import Explanation
    from ccam_deploy.methods import CollectionCAM

__version__ = "0.1.0"
__all__ = [
    "Bundle",
    "CcamError",
    "CollectionCAM",
    "Explainer",
    "Explanation",
    "Manifest",
    "load",
]

_HOMES = {
    "Bundle": "bundle.folder",
    "CcamError": "errors",
    "CollectionCAM": "methods",
    "Explainer": "explainer",
    "Explanation": "explanation",
    "Manifest": "bundle.manifest",
    "load": "explainer",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing the package stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

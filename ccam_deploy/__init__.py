"""Explanations of image classifiers at inference speed, without PyTorch at run time.

Example:
    import ccam_deploy as ccam

    explainer = ccam.load("engines/efficientnet_lite0")
    explanation = explainer.explain(images)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ccam_deploy.bundle.folder import Bundle
    from ccam_deploy.bundle.manifest import Manifest
    from ccam_deploy.errors import (
        BackendError,
        BundleError,
        CcamError,
        DatasetError,
        ExportError,
        ImageError,
        IntegrityError,
        LayerError,
        LoweringError,
        ManifestError,
        NotFiniteError,
        OptionError,
        OutputError,
        RequestError,
        ServerError,
        SignatureError,
        SourceError,
        TargetError,
        ToleranceError,
    )
    from ccam_deploy.explainer import Explainer, load
    from ccam_deploy.explanation import Explanation
    from ccam_deploy.inputs import Images
    from ccam_deploy.methods import (
        CAM,
        RISE,
        XRAI,
        CollectionCAM,
        ExcitationBackprop,
        GradCAM,
        GradCAMPlusPlus,
        GuidedBackprop,
        IntegratedGradients,
        LayerCAM,
        Method,
        ReciproCAM,
        ScoreCAM,
        SmoothGrad,
    )
    from ccam_deploy.render import Look
    from ccam_deploy.targets import Target, Targets, Top

__version__ = "0.1.0"
__all__ = [  # noqa: RUF022 (as a reader sorts them)
    "BackendError",
    "Bundle",
    "BundleError",
    "CAM",
    "CcamError",
    "CollectionCAM",
    "DatasetError",
    "ExcitationBackprop",
    "Explainer",
    "Explanation",
    "ExportError",
    "GradCAM",
    "GradCAMPlusPlus",
    "GuidedBackprop",
    "ImageError",
    "Images",
    "IntegratedGradients",
    "IntegrityError",
    "LayerCAM",
    "LayerError",
    "Look",
    "LoweringError",
    "Manifest",
    "ManifestError",
    "Method",
    "NotFiniteError",
    "OptionError",
    "OutputError",
    "RISE",
    "ReciproCAM",
    "RequestError",
    "ScoreCAM",
    "ServerError",
    "SignatureError",
    "SmoothGrad",
    "SourceError",
    "Target",
    "TargetError",
    "Targets",
    "ToleranceError",
    "Top",
    "XRAI",
    "load",
]

_NAMES_BY_MODULE = {
    "bundle.folder": ("Bundle",),
    "bundle.manifest": ("Manifest",),
    "errors": (
        "BackendError",
        "BundleError",
        "CcamError",
        "DatasetError",
        "ExportError",
        "ImageError",
        "IntegrityError",
        "LayerError",
        "LoweringError",
        "ManifestError",
        "NotFiniteError",
        "OptionError",
        "OutputError",
        "RequestError",
        "ServerError",
        "SignatureError",
        "SourceError",
        "TargetError",
        "ToleranceError",
    ),
    "explainer": ("Explainer", "load"),
    "explanation": ("Explanation",),
    "inputs": ("Images",),
    "methods": (
        "CAM",
        "CollectionCAM",
        "ExcitationBackprop",
        "GradCAM",
        "GradCAMPlusPlus",
        "GuidedBackprop",
        "IntegratedGradients",
        "LayerCAM",
        "Method",
        "RISE",
        "ReciproCAM",
        "ScoreCAM",
        "SmoothGrad",
        "XRAI",
    ),
    "render": ("Look",),
    "targets": ("Target", "Targets", "Top"),
}
_HOMES = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing the package stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

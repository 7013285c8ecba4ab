"""Explanation methods: each turns a batch of images and classes into saliency maps."""

from __future__ import annotations

from typing import Any

from ccam_deploy.errors import OptionError
from ccam_deploy.methods.activation import (
    CAM,
    CAMOptions,
    GradCAM,
    GradCAMOptions,
    GradCAMPlusPlus,
    GradCAMPlusPlusOptions,
    LayerCAM,
    LayerCAMOptions,
)
from ccam_deploy.methods.base import (
    Batch,
    LayerPartition,
    MaskSequence,
    Method,
    MethodResult,
    Stopwatch,
)
from ccam_deploy.methods.collection_cam import CollectionCAM, CollectionCAMOptions
from ccam_deploy.methods.excitation import ExcitationBackprop, ExcitationBackpropOptions
from ccam_deploy.methods.gradient import (
    GuidedBackprop,
    GuidedBackpropOptions,
    IntegratedGradients,
    IntegratedGradientsOptions,
    SmoothGrad,
    SmoothGradOptions,
)
from ccam_deploy.methods.recipro_cam import ReciproCAM, ReciproCAMOptions
from ccam_deploy.methods.region import RISE, RISEOptions, ScoreCAM, ScoreCAMOptions
from ccam_deploy.methods.xrai import XRAI, XRAIOptions

_ALL: tuple[type[Method[Any]], ...] = (
    CollectionCAM,
    GradCAM,
    GradCAMPlusPlus,
    LayerCAM,
    CAM,
    ScoreCAM,
    RISE,
    ReciproCAM,
    IntegratedGradients,
    SmoothGrad,
    GuidedBackprop,
    ExcitationBackprop,
    XRAI,
)
METHODS = {method.name: method for method in _ALL}
DEFAULT_METHOD = CollectionCAM.name

__all__ = [
    "CAM",
    "DEFAULT_METHOD",
    "METHODS",
    "RISE",
    "XRAI",
    "Batch",
    "CAMOptions",
    "CollectionCAM",
    "CollectionCAMOptions",
    "ExcitationBackprop",
    "ExcitationBackpropOptions",
    "GradCAM",
    "GradCAMOptions",
    "GradCAMPlusPlus",
    "GradCAMPlusPlusOptions",
    "GuidedBackprop",
    "GuidedBackpropOptions",
    "IntegratedGradients",
    "IntegratedGradientsOptions",
    "LayerCAM",
    "LayerCAMOptions",
    "LayerPartition",
    "MaskSequence",
    "Method",
    "MethodResult",
    "RISEOptions",
    "ReciproCAM",
    "ReciproCAMOptions",
    "ScoreCAM",
    "ScoreCAMOptions",
    "SmoothGrad",
    "SmoothGradOptions",
    "Stopwatch",
    "XRAIOptions",
    "method_named",
    "with_options",
]


def method_named(name: str) -> type[Method[Any]]:
    """A method's class. Raises OptionError for an unknown name."""
    if name not in METHODS:
        raise OptionError(f'method "{name}" is unknown; there are {", ".join(METHODS)}')
    return METHODS[name]


def with_options(name: str, options: object = None) -> Method[Any]:
    """A method by name, with its own options or its defaults.

    Raises OptionError for an unknown name and for options of another method.
    """
    method = method_named(name)
    if options is not None and not isinstance(options, method.options_type):
        given, wanted = type(options).__name__, method.options_type.__name__
        raise OptionError(f"the options are {given}; {name} takes {wanted}")
    return method(options)

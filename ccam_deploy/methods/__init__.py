"""Explanation methods: each turns a batch of images and classes into saliency maps."""

from __future__ import annotations

from typing import Any

from ccam_deploy.errors import OptionError
from ccam_deploy.methods.base import (
    Batch,
    LayerPartition,
    MaskSequence,
    Method,
    MethodResult,
    Stopwatch,
)
from ccam_deploy.methods.cam import CAM, CAMOptions
from ccam_deploy.methods.collection_cam.cpu import CollectionCAM
from ccam_deploy.methods.collection_cam.options import CollectionCAMOptions
from ccam_deploy.methods.excitation_backprop import ExcitationBackprop, ExcitationBackpropOptions
from ccam_deploy.methods.grad_cam import GradCAM, GradCAMOptions
from ccam_deploy.methods.grad_cam_plus_plus import GradCAMPlusPlus, GradCAMPlusPlusOptions
from ccam_deploy.methods.guided_backprop import GuidedBackprop, GuidedBackpropOptions
from ccam_deploy.methods.integrated_gradients import IntegratedGradients, IntegratedGradientsOptions
from ccam_deploy.methods.layer_cam import LayerCAM, LayerCAMOptions
from ccam_deploy.methods.recipro_cam import ReciproCAM, ReciproCAMOptions
from ccam_deploy.methods.rise import RISE, RISEOptions
from ccam_deploy.methods.score_cam import ScoreCAM, ScoreCAMOptions
from ccam_deploy.methods.smoothgrad import SmoothGrad, SmoothGradOptions
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

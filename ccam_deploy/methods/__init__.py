"""Explanation methods: each turns a batch of images and classes into saliency maps."""

from __future__ import annotations

from ccam_deploy.errors import OptionError
from ccam_deploy.methods.base import Batch, Context, Method
from ccam_deploy.methods.cam import CAM
from ccam_deploy.methods.collection_cam.cpu import CollectionCAM
from ccam_deploy.methods.excitation_backprop import ExcitationBackprop
from ccam_deploy.methods.grad_cam import GradCAM
from ccam_deploy.methods.grad_cam_plus_plus import GradCAMPlusPlus
from ccam_deploy.methods.guided_backprop import GuidedBackprop
from ccam_deploy.methods.integrated_gradients import IntegratedGradients
from ccam_deploy.methods.layer_cam import LayerCAM
from ccam_deploy.methods.recipro_cam import ReciproCAM
from ccam_deploy.methods.results import BatchResult, LayerPartition, MaskSequence, MethodResult
from ccam_deploy.methods.rise import RISE
from ccam_deploy.methods.score_cam import ScoreCAM
from ccam_deploy.methods.smoothgrad import SmoothGrad
from ccam_deploy.methods.stopwatch import Stopwatch
from ccam_deploy.methods.xrai import XRAI

_ALL: tuple[type[Method], ...] = (
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
    "BatchResult",
    "CollectionCAM",
    "Context",
    "ExcitationBackprop",
    "GradCAM",
    "GradCAMPlusPlus",
    "GuidedBackprop",
    "IntegratedGradients",
    "LayerCAM",
    "LayerPartition",
    "MaskSequence",
    "Method",
    "MethodResult",
    "ReciproCAM",
    "ScoreCAM",
    "SmoothGrad",
    "Stopwatch",
    "make_method",
    "method_named",
]


def method_named(name: str) -> type[Method]:
    """Look up a method's class by its name.

    Raises:
        OptionError: No method has the name.
    """
    if name not in METHODS:
        raise OptionError(f'method "{name}" is unknown; there are {", ".join(METHODS)}')
    return METHODS[name]


def make_method(method: str | Method) -> Method:
    """Turn what a caller names as a method into the method.

    Args:
        method: A method with its options, or a name among METHODS for its defaults.

    Raises:
        OptionError: The name is unknown, or the value is neither a name nor a method.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):  # for callers without a type checker
        raise OptionError(f"the method is {method!r}; give a name, or a method like GradCAM()")
    return method_named(method)()

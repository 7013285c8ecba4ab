"""Chooses how each method runs on the engines of an explainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.manifest import Manifest
from ccam_deploy.engines import Networks
from ccam_deploy.engines.cuda.graph_replay import CudaGraphs
from ccam_deploy.methods.base import Context, Method
from ccam_deploy.methods.collection_cam.cpu import CollectionCAM
from ccam_deploy.methods.collection_cam.cuda import CudaCollectionCAM, DeviceCollectionCAM
from ccam_deploy.methods.cuda.device_method import DevicePasses
from ccam_deploy.methods.cuda.gradient_cam import CudaGradCAM, CudaGradCAMPlusPlus, CudaLayerCAM
from ccam_deploy.methods.cuda.recipro_cam import CudaReciproCAM
from ccam_deploy.methods.cuda.rise import CudaRISE
from ccam_deploy.methods.cuda.score_cam import CudaScoreCAM
from ccam_deploy.methods.grad_cam import GradCAM
from ccam_deploy.methods.grad_cam_plus_plus import GradCAMPlusPlus
from ccam_deploy.methods.layer_cam import LayerCAM
from ccam_deploy.methods.recipro_cam import ReciproCAM
from ccam_deploy.methods.rise import RISE
from ccam_deploy.methods.score_cam import ScoreCAM

_ON_SLOTS: Mapping[type[Method], Callable[..., Method]] = {
    GradCAM: CudaGradCAM,
    GradCAMPlusPlus: CudaGradCAMPlusPlus,
    LayerCAM: CudaLayerCAM,
    ScoreCAM: CudaScoreCAM,
    RISE: CudaRISE,
    ReciproCAM: CudaReciproCAM,
}
"""How methods run on a GPU's slots; Collection-CAM has its own pipeline, others host arrays."""


class MethodFactory:
    """Makes a method's implementation for some engines: on the GPU where they have slots.

    Attributes:
        on_device: Collection-CAM on the slots, or None where there are none.
        passes: Other methods' passes on the slots, or None where there are none.
        context: What methods run on.
    """

    def __init__(
        self,
        manifest: Manifest,
        networks: Networks,
        baseline: Floats,
        gradient_scale: float,
        batch_size: int,
        cuda_graphs: CudaGraphs,
    ) -> None:
        self._networks = networks
        self.context = Context(
            networks,
            tuple(layer.name for layer in manifest.layers),
            baseline,
            batch_size,
            manifest.preprocessing.mean,
            manifest.preprocessing.std,
            manifest.probabilities_by,
            manifest.input,
        )
        self.on_device: DeviceCollectionCAM | None = None
        self.passes: DevicePasses | None = None
        if networks.slots is not None:
            self.passes = DevicePasses(
                networks.slots, manifest, gradient_scale, batch_size, cuda_graphs
            )
            self.on_device = DeviceCollectionCAM(self.passes, baseline)

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each option that does not work on the slots."""
        return () if self.passes is None else self.passes.notes

    def implement(self, method: Method) -> Method:
        """Return what explains as the method says, on these engines."""
        if self.on_device is not None and isinstance(method, CollectionCAM):
            if method.has_device_kernels:
                return CudaCollectionCAM(method, self.on_device)
            return method
        if self.passes is None or (isinstance(method, RISE) and method.file):
            return method
        if isinstance(method, ReciproCAM) and self._networks.head_takes_rest:
            return method  # the class tokens beside the maps go through host arrays
        make = _ON_SLOTS.get(type(method))
        return method if make is None else make(method, self.passes)

"""Chooses how each method runs on the engines of an explainer."""

from __future__ import annotations

from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.manifest import Manifest
from ccam_deploy.engines import Networks
from ccam_deploy.methods.base import Context, Method
from ccam_deploy.methods.collection_cam.cpu import CollectionCAM
from ccam_deploy.methods.collection_cam.cuda import CudaCollectionCAM, DeviceCollectionCAM
from ccam_deploy.methods.cuda.device_method import DeviceForwards
from ccam_deploy.methods.cuda.rise import CudaRISE
from ccam_deploy.methods.cuda.score_cam import CudaScoreCAM
from ccam_deploy.methods.rise import RISE
from ccam_deploy.methods.score_cam import ScoreCAM


class MethodFactory:
    """Makes a method's implementation for some engines: on the GPU where they have slots.

    Attributes:
        on_device: Collection-CAM on the slots, or None where there are none.
        forwards: Masked forwards on the slots, or None where there are none.
        context: What methods run on.
    """

    def __init__(
        self,
        manifest: Manifest,
        networks: Networks,
        baseline: Floats,
        gradient_scale: float,
        batch_size: int,
        cuda_graphs: bool,
    ) -> None:
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
        self.forwards: DeviceForwards | None = None
        if networks.slots is not None:
            self.on_device = DeviceCollectionCAM(
                networks.slots, manifest, gradient_scale, baseline, batch_size, cuda_graphs
            )
            self.forwards = DeviceForwards(networks.slots, manifest, batch_size, cuda_graphs)

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each option that does not work on the slots."""
        devices = (self.on_device, self.forwards)
        lines = [line for device in devices if device is not None for line in device.notes]
        return tuple(dict.fromkeys(lines))

    def implement(self, method: Method) -> Method:
        """Return what explains as the method says, on these engines."""
        if self.on_device is not None and isinstance(method, CollectionCAM):
            if method.has_device_kernels:
                return CudaCollectionCAM(method, self.on_device)
            return method
        if self.forwards is not None and isinstance(method, ScoreCAM):
            return CudaScoreCAM(method, self.forwards)
        if self.forwards is not None and isinstance(method, RISE) and not method.file:
            return CudaRISE(method, self.forwards)
        return method

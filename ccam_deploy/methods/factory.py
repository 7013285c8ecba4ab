"""Chooses how each method runs on the engines of an explainer."""

from __future__ import annotations

from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.manifest import Manifest
from ccam_deploy.engines import Networks
from ccam_deploy.methods.base import Context, Method
from ccam_deploy.methods.collection_cam.cpu import CollectionCAM
from ccam_deploy.methods.collection_cam.cuda import CudaCollectionCAM, DeviceCollectionCAM


class MethodFactory:
    """Makes a method's implementation for some engines: on the GPU where they have slots.

    Attributes:
        on_device: Collection-CAM on the slots, or None where there are none.
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
        )
        self.on_device: DeviceCollectionCAM | None = None
        if networks.slots is not None:
            self.on_device = DeviceCollectionCAM(
                networks.slots, manifest, gradient_scale, baseline, batch_size, cuda_graphs
            )

    def implement(self, method: Method) -> Method:
        """Return what explains as the method says, on these engines."""
        if self.on_device is not None and isinstance(method, CollectionCAM):
            return CudaCollectionCAM(method, self.on_device)
        return method

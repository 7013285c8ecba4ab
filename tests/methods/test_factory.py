"""Where a method runs: on the device, or with the kernels of the CPU."""

from __future__ import annotations

from typing import cast

from ccam_deploy.methods import CollectionCAM
from ccam_deploy.methods.collection_cam.cuda import CudaCollectionCAM, DeviceCollectionCAM
from ccam_deploy.methods.factory import MethodFactory


def test_a_gate_has_no_kernels_on_the_device() -> None:
    factory = object.__new__(MethodFactory)
    factory.on_device = cast(DeviceCollectionCAM, object())
    factory.passes = None
    gated = CollectionCAM(gate=0.1)
    assert factory.implement(gated) is gated
    assert isinstance(factory.implement(CollectionCAM(k_max=5)), CudaCollectionCAM)

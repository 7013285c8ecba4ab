"""Slots that run a bundle's graphs on ONNX Runtime's CUDA provider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ccam_deploy.engines.cuda.pycuda import CudaDevice
from ccam_deploy.engines.cuda.slots import Slot, Slots
from ccam_deploy.engines.onnxruntime import OnnxRuntimeGraph, check_provider


def onnxruntime_slots(paths: Mapping[str, Path], most: int) -> Slots:
    """Slots on ONNX graphs; a session works on one stream, so each slot has sessions of its own.

    Raises BackendError where a package, the CUDA provider or a GPU is missing.
    """
    check_provider("cuda")

    def open_slot() -> Slot:
        device = CudaDevice()
        try:
            with device.current():
                graphs = {
                    name: OnnxRuntimeGraph(path, "cuda", device.stream)
                    for name, path in paths.items()
                }
        except BaseException:
            device.close()
            raise
        return Slot(device, {"latency": graphs, "throughput": graphs})

    return Slots(open_slot, most)

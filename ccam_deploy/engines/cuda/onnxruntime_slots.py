"""Slots that run a bundle's graphs on ONNX Runtime's CUDA provider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ccam_deploy.engines.cuda.pycuda import CudaDevice
from ccam_deploy.engines.cuda.slot_thread import SlotThread
from ccam_deploy.engines.cuda.slots import Slot, Slots
from ccam_deploy.engines.onnxruntime import OnnxRuntimeGraph, require_provider
from ccam_deploy.engines.tensorrt.library import present_device, why_without
from ccam_deploy.errors import BackendError


def onnxruntime_slots(paths: Mapping[str, Path], most: int, tf32: bool = False) -> Slots:
    """Make slots on ONNX graphs; each has its own sessions, because a session uses one stream.

    Args:
        paths: The graphs' files, by name.
        most: How many slots there may be at a time.
        tf32: Whether products of float32 may round their factors to 10 bits of mantissa.

    Returns:
        The slots, one of them open.

    Raises:
        BackendError: A package, the CUDA provider or a GPU is missing, or the GPU has no TF32.
    """
    require_provider("cuda")
    if tf32 and (reason := why_without(present_device(), "tf32")):
        raise BackendError(reason)

    def open_slot() -> Slot:
        device = CudaDevice()
        try:
            with device.current():
                graphs = {
                    name: OnnxRuntimeGraph(path, "cuda", device.stream, tf32, lambda: slots.claim())
                    for name, path in paths.items()
                }
        except BaseException:
            device.close()
            raise
        # What ONNX Runtime captures in one thread, it does not replay in another.
        worker = SlotThread("ccam-deploy-gpu")
        return Slot(device, {"latency": graphs, "throughput": graphs}, worker)

    slots = Slots(open_slot, most, captures_alone=True)
    return slots

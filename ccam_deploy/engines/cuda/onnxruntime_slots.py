"""Slots that run a bundle's graphs on ONNX Runtime's CUDA provider."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ccam_deploy.engines.cuda.pycuda import CudaDevice
from ccam_deploy.engines.cuda.slots import Slot, Slots
from ccam_deploy.engines.onnxruntime import OnnxRuntimeGraph, require_provider


def onnxruntime_slots(paths: Mapping[str, Path], most: int) -> Slots:
    """Make slots on ONNX graphs; each has its own sessions, because a session uses one stream.

    Args:
        paths: The graphs' files, by name.
        most: How many slots there may be at a time.

    Returns:
        The slots, one of them open.

    Raises:
        BackendError: A package, the CUDA provider or a GPU is missing.
    """
    require_provider("cuda")

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
        # What ONNX Runtime captures in one thread, it does not replay in another.
        worker = ThreadPoolExecutor(1, "ccam-deploy-gpu")
        return Slot(device, {"latency": graphs, "throughput": graphs}, worker)

    return Slots(open_slot, most)

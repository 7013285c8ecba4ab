"""Examples of what kernels are launched with, from explanations in Numba's simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ccam_deploy.methods import RISE, CollectionCAM, ScoreCAM
from tests.engines.cuda.host_device import Call, Job, run
from tests.helpers import noise

Launch = tuple[str, tuple[Any, ...]]
"""A kernel's name, and a value of the type of each argument."""


def launched(bundle: Path, precision: str) -> list[Launch]:
    """Explain two images for two classes each; in a process started by `simulator`."""
    from numba.cuda.simulator.kernel import FakeCUDAKernel

    seen: list[Launch] = []
    launch = FakeCUDAKernel.__call__

    def recording(kernel: Any, *arguments: Any) -> Any:
        if not kernel._device:
            seen.append((kernel.fn.__name__, tuple(map(_example, arguments))))
        return launch(kernel, *arguments)

    FakeCUDAKernel.__call__ = recording
    try:
        images, targets = noise(2, 3, 16, 24), [[0, 1], [0, 1]]
        methods = CollectionCAM(k_max=3, standardise=True), ScoreCAM(), RISE(masks=4, cells=3)
        run(Job(bundle, tuple(Call(images, targets, method) for method in methods), precision))
    finally:
        FakeCUDAKernel.__call__ = launch
    return seen


def _example(argument: Any) -> Any:
    if not hasattr(argument, "dtype") or isinstance(argument, np.generic):
        return argument
    values = argument._ary
    assert values.flags.c_contiguous
    return np.empty((2,) * values.ndim, values.dtype)

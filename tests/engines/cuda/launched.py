"""Examples of what kernels are launched with, from explanations in Numba's simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ccam_deploy.methods import (
    RISE,
    CollectionCAM,
    GradCAM,
    LayerCAM,
    ReciproCAM,
    ScoreCAM,
)
from tests.engines.cuda.host_device import Call, Job, run
from tests.helpers import noise

Launch = tuple[str, tuple[Any, ...]]
"""A kernel's name, and a value of the type of each argument."""


def launched(bundle: Path, precision: str) -> list[Launch]:
    """Explain an image for two classes; in a process started by `simulator`."""
    from numba.cuda.simulator.kernel import FakeCUDAKernel

    seen: list[Launch] = []
    launch = FakeCUDAKernel.__call__

    def recording(kernel: Any, *arguments: Any) -> Any:
        if not kernel._device:
            seen.append((kernel.fn.__name__, tuple(map(_example, arguments))))
        return launch(kernel, *arguments)

    FakeCUDAKernel.__call__ = recording
    try:
        images, targets = noise(1, 3, 16, 24), [[0, 1]]
        methods = (
            CollectionCAM(k_max=2, standardise=True),
            ScoreCAM(channels=2),
            RISE(masks=2, cells=3),
            GradCAM(),
            LayerCAM(layers=("relu1", "relu2")),
            ReciproCAM(),
        )
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

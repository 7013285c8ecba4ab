"""A job on the host device, and what its classifier was given; a kernel of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

import ccam_deploy as ccam
from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.engines.onnxruntime import OnnxRuntimeGraph
from ccam_deploy.methods import Method
from ccam_deploy.methods.cuda import rise
from tests.engines.cuda import host_device
from tests.engines.cuda.host_device import Call, Job, Report, run
from tests.helpers import noise

Binding = tuple[tuple[str, int, tuple[int, ...]], ...]
"""The name, address and shape of each tensor."""


@dataclass(frozen=True)
class Recorded:
    """A job's report, and the tensors that its classifier was bound to, in order."""

    report: Report
    bound: list[Binding]

    def rows(self, graph: str) -> list[int]:
        """The rows of each launch of a graph."""
        calls = self.report.launches
        return [rows for launches in calls for name, rows in launches if name == graph]


Run = Callable[..., Recorded]
"""Runs a job elsewhere; takes what `run_recorded` takes."""


def run_recorded(job: Job, most_cells: int = rise.MOST_CELLS, threads: int = 32) -> Recorded:
    """Run a job in this process, which must have been started by `simulator`.

    most_cells: how many cells of RISE's grids lie on the device.   threads: per block.
    """
    bound: list[Binding] = []
    plain = OnnxRuntimeGraph._binding

    def binding(graph: OnnxRuntimeGraph, tensors: Mapping[str, DeviceTensor]) -> Any:
        if "masks" in tensors:
            bound.append(tuple(sorted((name, t.address, t.shape) for name, t in tensors.items())))
        return plain(graph, tensors)

    with (
        patch.object(OnnxRuntimeGraph, "_binding", binding),
        patch.object(rise, "MOST_CELLS", most_cells),
        patch.object(host_device, "_THREADS", threads),
    ):
        return Recorded(run(job), bound)


def accumulated(
    scores: NDArray[np.float32], masks: NDArray[np.float32], owner: list[int], item: list[int]
) -> NDArray[np.float64]:
    """RISE's sums of a chunk, for a pair of each image.

    scores: [P, n].   masks: [n, pixels].   owner, item: [n].
    """
    from numba import cuda

    from ccam_deploy.kernels.cuda import grids

    pairs = len(scores)
    total = cuda.to_device(np.zeros((pairs, masks.shape[1])))
    arrays = scores, masks, np.array(owner, np.int64), np.array(item, np.int32)
    progress = np.array([0, len(masks), pairs, pairs], np.int32)
    pair_owner = cuda.to_device(np.arange(pairs, dtype=np.int32))
    given = map(cuda.to_device, arrays)
    grids.accumulate[(1, pairs), 32](cuda.to_device(progress), *given, pair_owner, total)
    return total.copy_to_host()  # type: ignore[no-any-return]


def assert_same(actual: ccam.Explanation, expected: ccam.Explanation, tolerance: float) -> None:
    """Equal within a tolerance; to the bit where that is zero."""
    assert actual.targets.tolist() == expected.targets.tolist()
    assert actual.image_index.tolist() == expected.image_index.tolist()
    for name in ("logits", "raw_saliency"):
        values, others = getattr(actual, name), getattr(expected, name)
        np.testing.assert_allclose(values, others, rtol=0, atol=tolerance)
    for pair in range(len(expected)):
        for name in ("weights", "mic"):
            values, others = getattr(actual, name)[pair], getattr(expected, name)[pair]
            np.testing.assert_allclose(values, others, rtol=0, atol=tolerance)
    np.testing.assert_allclose(actual.saliency, expected.saliency, rtol=0, atol=10 * tolerance)


def assert_close_in_half(bundle: Path, device: Run, method: Method) -> None:
    """In fp16, two images and three classes on the device are close to the CPU's."""
    call = Call(noise(2, 3, 16, 24), [[0, 3], 2], method)
    got = device(Job(bundle, (call,), "fp16")).report.results[0]
    with ccam.load(bundle, backend="onnxruntime-cpu", precision="fp16") as explainer:
        expected = explainer.explain(call.images, call.targets, method=call.method)
    np.testing.assert_allclose(got.raw_saliency, expected.raw_saliency, atol=2e-3)
    assert np.corrcoef(got.saliency.ravel(), expected.saliency.ravel())[0, 1] > 0.999


def summed(features: NDArray[np.float32], slopes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Layer-CAM's sums, negative values cut off, for a pair of each image.

    features, slopes: [P, C, pixels].
    """
    from numba import cuda

    from ccam_deploy.kernels.cuda import layer_maps

    pairs, _, pixels = features.shape
    sums = cuda.to_device(np.zeros((pairs, pixels), np.float32))
    progress = cuda.to_device(np.array([0, 0, pairs, 0], np.int32))
    owner = cuda.to_device(np.arange(pairs, dtype=np.int32))
    given = map(cuda.to_device, (features, slopes))
    layer_maps.positive_gradients[(1, pairs), 64](progress, owner, *given, 1.0, 1, sums)
    return sums.copy_to_host()  # type: ignore[no-any-return]

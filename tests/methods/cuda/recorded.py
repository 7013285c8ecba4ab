"""A job on the host device, and what each launch of its classifier was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.engines.onnxruntime import OnnxRuntimeGraph
from ccam_deploy.methods.cuda import rise
from tests.engines.cuda import host_device
from tests.engines.cuda.host_device import Job, Report, run

Launch = tuple[tuple[str, int, tuple[int, ...]], ...]
"""The name, address and shape of each tensor."""


@dataclass(frozen=True)
class Recorded:
    """A job's report, its launches of the classifier in order, and the backbone's rows."""

    report: Report
    classifier: list[Launch]
    backbone: list[int]

    @property
    def shapes(self) -> set[tuple[tuple[int, ...], ...]]:
        """The shapes that the classifier was launched with."""
        return {tuple(shape for _, _, shape in launch) for launch in self.classifier}


def run_recorded(job: Job, most_cells: int = rise.MOST_CELLS, threads: int = 32) -> Recorded:
    """Run a job in this process, which must have been started by `simulator`.

    most_cells: how many cells of RISE's grids lie on the device.   threads: per block.
    """
    classifier: list[Launch] = []
    backbone: list[int] = []
    plain = OnnxRuntimeGraph.launch

    def launch(graph: OnnxRuntimeGraph, tensors: Mapping[str, DeviceTensor]) -> None:
        if "masks" in tensors:
            given = sorted((name, t.address, t.shape) for name, t in tensors.items())
            classifier.append(tuple(given))
        else:
            backbone.append(tensors["images"].shape[0])
        plain(graph, tensors)

    with (
        patch.object(OnnxRuntimeGraph, "launch", launch),
        patch.object(rise, "MOST_CELLS", most_cells),
        patch.object(host_device, "_THREADS", threads),
    ):
        return Recorded(run(job), classifier, backbone)


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

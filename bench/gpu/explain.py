"""Part of bench_gpu: whole explanations, from preprocessed arrays to the result."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from msgspec.structs import asdict

import ccam_deploy as ccam
from bench import harness
from bench.gpu.pieces import BATCHES, Figures, Piece, measure_pieces, pieces_in
from ccam_deploy.arrays import Floats
from ccam_deploy.errors import BackendError
from ccam_deploy.image_files import load_image
from ccam_deploy.latency.conditions import CPU, gpu
from ccam_deploy.latency.stages import (
    host_share,
    measure_stages,
    median_stages,
    stage_by_stage,
)
from ccam_deploy.latency.timing import summarise
from ccam_deploy.methods import ScoreCAM

BATCH_SIZE = 64
"""The most images, and masked images, that go through an engine at a time, as in the floor."""

_INPUTS = 3
_STEP = 17
_DURATION = 0.6
_LIMIT = 5.0
_FORWARDS = "classifier"
"""The stage of masked forwards."""


def inputs(explainer: ccam.Explainer, batch: int) -> list[Floats]:
    """Make some batches [B, C, H, W] of a photograph, shifted by different numbers of pixels.

    They have different numbers of masks, as pictures of users have.
    """
    (photograph,), _ = explainer.preprocess([load_image(harness.PHOTOGRAPH)])
    shifts = [_STEP * place for place in range(_INPUTS * batch)]
    images = np.stack([np.roll(photograph, shift, axis=2) for shift in shifts])
    return list(images.reshape(_INPUTS, batch, *photograph.shape))


def count_masks(result: ccam.Explanation) -> int:
    """Count the masked images of an explanation: those that are not flat."""
    return sum(int(sequence.any(axis=(1, 2)).sum()) for sequence in result.masks)


def measure(
    explainer: ccam.Explainer, batch: int, now: Callable[[], float] = time.perf_counter
) -> Figures:
    """Time explanations of a batch, replayed as under load.

    Args:
        explainer: What is measured.
        batch: Images.
        now: A clock in seconds.

    Returns:
        Milliseconds of a call, of the first, on the device and beside it; the host's share, and
        the median number of masked images.
    """
    on_gpu = explainer.networks.backend != CPU
    calls = inputs(explainer, batch)
    begun = now()
    explainer.explain(calls[0])
    first = now() - begun
    masks = [count_masks(explainer.explain(images)) for images in calls]
    replayed = measure_stages(explainer, calls, _DURATION, now, now() + _LIMIT)
    return {
        "masks": round(median(masks)),
        "ms": asdict(summarise([call.total for call in replayed])),
        "first_ms": round(1000 * first, 1),
        "device_ms": round(1000 * median(call.device for call in replayed), 3),
        "host_ms": round(1000 * median(call.total - call.device for call in replayed), 3),
        "host_share": host_share(replayed, on_gpu),
    }


def stages_of_one(
    explainer: ccam.Explainer, now: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Time the stages of a single image, launched one by one: milliseconds by name."""
    plain = stage_by_stage(explainer)
    calls = inputs(explainer, 1)
    return median_stages(measure_stages(plain, calls, _DURATION / 4, now, now() + _LIMIT))


def measure_score_cam(
    explainer: ccam.Explainer, now: Callable[[], float] = time.perf_counter
) -> Figures:
    """Time Score-CAM of one image, and the masked forwards among it.

    Args:
        explainer: What is measured.
        now: A clock in seconds.

    Returns:
        Milliseconds of a call and of its forwards, how much longer the call takes than these, and
        the number of masked images.
    """
    method = ScoreCAM()
    calls = inputs(explainer, 1)[:1]
    masks = int(np.count_nonzero(explainer.explain(calls[0], method=method).weights[0]))
    timed = measure_stages(explainer, calls, _DURATION, now, now() + _LIMIT, method)
    launched = timed
    if not all(_FORWARDS in call.seconds for call in timed):  # they are inside of a CUDA graph
        plain = stage_by_stage(explainer)
        launched = measure_stages(plain, calls, _DURATION, now, now() + _LIMIT, method)
    total = summarise([call.total for call in timed])
    forwards = 1000 * median(call.seconds[_FORWARDS] for call in launched)
    return {
        "masks": masks,
        "ms": asdict(total),
        "forwards_ms": round(forwards, 3),
        "overhead": round(total.median / forwards, 3),
    }


class Explainers:
    """Opens a bundle in one precision after the other, and watches the GPU's memory.

    Args:
        bundle: The bundle's folder.
        backend: "auto", or a backend by name.
    """

    def __init__(self, bundle: Path, backend: str) -> None:
        self._bundle = bundle
        self._backend = backend
        self._before = used_memory()
        self._precision = ""
        self._prepared = 0
        self._explainer: ccam.Explainer | None = None

    def measure(self, piece: Piece) -> Figures:
        """Measure a piece, and the memory that this process has taken on the GPU.

        The memory of a precision only grows with the batch, so what it is at the end is its peak.
        """
        explainer = self._of(piece.precision)
        if piece.kind == "score-cam":
            explainer.warm_up(method=ScoreCAM())
            return measure_score_cam(explainer)
        warm_up = self._warm_up(explainer, piece.batch)
        figures = measure(explainer, piece.batch)
        figures["warm_up_ms"] = warm_up
        figures["memory_mib"] = memory_since(self._before)
        figures["backend"] = explainer.networks.backend
        if piece.batch == 1:
            figures["stages_ms"] = stages_of_one(explainer)
        return figures

    def _warm_up(self, explainer: ccam.Explainer, batch: int) -> float:
        """Prepare for a single image alone, or for every batch: the milliseconds that it took."""
        begun = time.perf_counter()
        if batch > self._prepared:
            self._prepared = 1 if batch == 1 else max(BATCHES)
            explainer.warm_up(self._prepared)
        return round(1000 * (time.perf_counter() - begun), 1)

    def _of(self, precision: str) -> ccam.Explainer:
        if self._explainer is None or self._precision != precision:
            self.close()
            self._explainer = ccam.load(
                self._bundle, backend=self._backend, precision=precision, batch_size=BATCH_SIZE
            )
            self._precision, self._prepared = precision, 0
        require_gpu(self._explainer)
        return self._explainer

    def close(self) -> None:
        """Close the explainer that is open."""
        if self._explainer:
            self._explainer.close()
        self._explainer = None


def require_gpu(explainer: ccam.Explainer) -> None:
    """Raise BackendError where the engines fell back to the CPU."""
    if explainer.networks.backend == CPU:
        raise BackendError("; ".join(explainer.notes) or "no backend for a GPU is installed")


def memory_since(before: float | None) -> float | None:
    """Return by how many MiB the memory in use on the GPU has grown; None where unknown."""
    after = used_memory()
    return None if before is None or after is None else after - before


def used_memory() -> float | None:
    """Return the GPU's memory in use in MiB, by all processes; None where it is unknown."""
    card = gpu()
    return card.memory_mib if card else None


def main() -> None:
    """Measure the pieces of one bundle, given as BUNDLE BACKEND PIECES."""
    bundle, backend, pieces = sys.argv[1:]
    explainers = Explainers(Path(bundle), backend)
    try:
        measure_pieces(pieces_in(pieces), explainers.measure)
    finally:
        explainers.close()


if __name__ == "__main__":
    main()

"""RISE (Petsiuk et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.array_files import read_array
from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Classifier
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.errors import OptionError
from ccam_deploy.kernels import cpu
from ccam_deploy.methods.base import Batch, Method, require_finite_masked
from ccam_deploy.methods.results import MethodResult
from ccam_deploy.methods.scores import Score, require_score, score_of
from ccam_deploy.methods.stopwatch import Stopwatch

_MOST_MASKS = 1_000_000


@dataclass(frozen=True)
class RISE(Method):
    """Averages random masks, each weighted by the score under it (Petsiuk et al. 2018, eq. 6).

    Attributes:
        masks: How many random masks are drawn.
        cells: How many cells a mask has along each side.
        p: The probability that a cell is kept, in (0, 1].
        seed: Seed of the random numbers.
        score: What F_c is: the probability of the class, or its logit.
        file: A .npy file of masks [N, H, W] in [0, 1] to use instead of random ones.
    """

    name = "rise"
    masks: int = 4000
    cells: int = 8
    p: float = 0.5
    seed: int = 0
    score: Score = "probability"
    file: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.masks <= _MOST_MASKS:
            raise OptionError(f"masks is {self.masks}; it must be 1 to {_MOST_MASKS}")
        if self.cells < 1:
            raise OptionError(f"cells is {self.cells}; it must be at least 1")
        if not 0 < self.p <= 1:
            raise OptionError(f"p is {self.p}; it must be above 0 and at most 1")
        if self.seed < 0:
            raise OptionError(f"seed is {self.seed}; it must be at least 0")
        require_score(self.score)
        random = (self.masks, self.cells, self.seed)
        if self.file and random != (RISE.masks, RISE.cells, RISE.seed):
            raise OptionError("masks, cells and seed make random masks; leave them out with a file")

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain every pair of a batch; see Method."""
        total = np.zeros((len(batch.owner), math.prod(batch.size)), np.float64)
        count = 0
        chunks = self._chunks(batch)
        while True:
            with clock.stage("masks"):
                masks = next(chunks, None)
            if masks is None:
                break
            count += len(masks)
            for image in np.unique(batch.owner):
                pairs = np.flatnonzero(batch.owner == image)
                owner = np.zeros(len(masks), np.int64)
                with clock.stage("classifier"):
                    logits = classifier.masked_logits(batch.images[image][None], masks, owner)
                    require_finite_masked(logits)
                with clock.stage("combine"):
                    for pair in pairs:
                        classes = np.full(len(masks), batch.targets[pair])
                        scores = score_of(self.score, logits, classes, batch.activation)
                        total[pair] += np.einsum("n,np->p", scores, masks.reshape(len(masks), -1))
        with clock.stage("combine"):
            mean = (total / (count * self.p)).astype(np.float32)
            return MethodResult.of_maps(mean.reshape(-1, *batch.size))

    def require_support(self, classifier: Classifier, batch: Batch) -> None:
        """Draw or read the first masks; see Method."""
        next(self._chunks(batch))

    def _chunks(self, batch: Batch) -> Iterator[Floats]:
        """Draw or read the masks, a chunk [N, H, W] at a time."""
        if self.file:
            stored = read_masks(self.file, batch.size)
            for rows in row_chunks(len(stored), batch.chunk):
                masks = np.array(stored[rows], np.float32)
                if not (masks.min() >= 0 and masks.max() <= 1):
                    raise OptionError(f"{self.file} has masks outside of [0, 1]")
                yield masks
            return
        source = np.random.default_rng(self.seed)
        for rows in row_chunks(self.masks, batch.chunk):
            yield random_masks(source, rows.stop - rows.start, self.cells, self.p, batch.size)


def random_masks(
    source: np.random.Generator, count: int, cells: int, p: float, size: tuple[int, int]
) -> Floats:
    """Draw RISE's masks (Petsiuk et al. 2018, section 3.2).

    A grid of zeros and ones is enlarged to one cell more than the image along each side. The mask
    is cut out of it from a random corner in the first cell.

    Args:
        source: Random numbers; masks drawn in several calls equal those drawn in one.
        count: How many masks.
        cells: How many cells the grid has along each side.
        p: The probability of a one.
        size: Height and width of the masks.

    Returns:
        [count, H, W] float32 in [0, 1].

    Raises:
        OptionError: There are more cells than pixels.
    """
    grids, corners = random_grids(source, count, cells, p, size)
    wide = cpu.upsample(grids.astype(np.float32), enlarged_size(cells, size))
    return np.stack(
        [
            grid[y : y + size[0], x : x + size[1]]
            for grid, (y, x) in zip(wide, corners.tolist(), strict=True)
        ]
    )


def random_grids(
    source: np.random.Generator, count: int, cells: int, p: float, size: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Draw the grids of RISE's masks, and the corners where they are cut out; see random_masks.

    Returns:
        [count, cells, cells] uint8, 0 or 1, and the row and column of each corner, [count, 2]
        int32.

    Raises:
        OptionError: There are more cells than pixels.
    """
    if cells > min(size):
        raise OptionError(f"cells is {cells}; an input of {size[0]}x{size[1]} takes {min(size)}")
    cell = [math.ceil(length / cells) for length in size]
    grids = np.empty((count, cells, cells), np.uint8)
    corners = np.empty((count, 2), np.int32)
    for index in range(count):  # mask by mask, so that chunks of any size give the same masks
        grids[index] = source.random((cells, cells)) < p
        corners[index] = source.integers(0, cell)
    return grids, corners


def enlarged_size(cells: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an enlarged grid of cells, out of which masks of a size are cut."""
    height, width = ((cells + 1) * math.ceil(length / cells) for length in size)
    return height, width


def read_masks(file: str, size: tuple[int, int]) -> NDArray[np.floating]:
    """Open the masks of a .npy file; each is read when it is used.

    Args:
        file: The file's path.
        size: Height and width that the masks must have.

    Returns:
        [N, H, W] of a floating-point or boolean type.

    Raises:
        OptionError: The file cannot be read, or its array does not fit.
    """
    masks = read_array(Path(file), mmap_mode="r")
    fits = masks.ndim == 3 and masks.shape[1:] == size and len(masks) and masks.dtype.kind in "fb"
    if not fits:
        raise OptionError(
            f"{file} holds {masks.dtype}{list(masks.shape)}; "
            f"the bundle takes masks float32[N, {size[0]}, {size[1]}]"
        )
    return masks

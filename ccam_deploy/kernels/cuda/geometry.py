"""Where each layer lies in the arrays that the kernels share, and how large those arrays are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ccam_deploy.errors import OptionError
from ccam_deploy.kernels.cuda.buffers import Buffers, Spec

EXACT_ROWS, COARSE_ROWS, LINK_ROWS = 14, 6, 7
"""Rows of the arrays that hold Ward's hierarchy, see `hierarchy`."""

TILE = 32
LARGEST_K = 32
LARGEST_LAYER = 4096
DIGITS, BINS = 3, 1 << 10
"""A quantile is found by so many digits of a value's bits, each of so many values."""
MAP_PARTS = 256
"""The most blocks among which a map of the input's size is shared out."""

PARTITION_THREADS = 512
"""The most threads of the block that cuts a layer's hierarchy."""

BLOCK_CLUSTERS = 256
"""The most clusters of a layer that one block merges in shared memory."""
_LEFT_BY_A_ROUND = 0.8
"""About the share of a layer's clusters that a round of merging leaves."""


class LayerRow(NamedTuple):
    """A row of the table of layers, as kernels read it.

    Attributes:
        channels: C.
        height: h.
        width: w.
        features: Where the layer starts in the features of all layers, in elements.
        gradients: Where it starts in the gradients of all layers, in elements.
        first_channel: Its first channel among those of all layers.
        first_pixel: Its first pixel among those of one channel of every layer.
        first_tile: Its first tile of TILE pixels among those of all layers.
    """

    channels: int
    height: int
    width: int
    features: int
    gradients: int
    first_channel: int
    first_pixel: int
    first_tile: int


@dataclass(frozen=True)
class LayerPlace:
    """One target layer.

    Attributes:
        channels: C.
        height: h.
        width: w.
        features: Where the layer's [images, C, h, w] start in the features of all layers, in
            elements.
        gradients: Where its [pairs, C, h, w] start in the gradients of all layers, in elements.
    """

    channels: int
    height: int
    width: int
    features: int
    gradients: int


@dataclass(frozen=True)
class Geometry:
    """The sizes of one bundle on one slot, and the options that they depend on.

    Attributes:
        layers: The target layers, the final one last.
        size: H, W of the input.
        pairs: The most (image, class) pairs of one batch.
        k_max: The most collections that a layer may have in any batch.
        theta: Mask values not above this quantile become 0; in [0, 1).
        mask_dtype: The type in which the classifier takes its masks, float32 or float16.
        block_clusters: Down to how many clusters the whole grid merges those of a layer, before
            one block goes on; 1 to BLOCK_CLUSTERS. Results do not depend on it.
        block_pixels: How many pixels of a mask a block renders, or fewer. Results do not depend on
            it.

    Raises:
        OptionError: A size exceeds what the kernels take.
    """

    layers: tuple[LayerPlace, ...]
    size: tuple[int, int]
    pairs: int
    k_max: int = 10
    theta: float = 0.1
    mask_dtype: DTypeLike = np.float32
    block_clusters: int = BLOCK_CLUSTERS
    block_pixels: int = 1 << 13

    def __post_init__(self) -> None:
        if self.k_max > LARGEST_K:
            raise OptionError(f"k_max is {self.k_max}; the GPU kernels take at most {LARGEST_K}")
        for number, layer in enumerate(self.layers):
            if layer.channels > LARGEST_LAYER:
                raise OptionError(
                    f"layer {number} has {layer.channels} channels; "
                    f"the GPU kernels take at most {LARGEST_LAYER}"
                )

    @property
    def channels(self) -> int:
        """Channels of all layers."""
        return sum(layer.channels for layer in self.layers)

    @property
    def pixels(self) -> int:
        """Pixels of one channel of every layer."""
        return sum(layer.height * layer.width for layer in self.layers)

    @property
    def tiles(self) -> int:
        """Tiles of at most TILE pixels; none lies in two layers."""
        return sum(map(_tiles, self.layers))

    @property
    def grid_rounds(self) -> int:
        """How many rounds of merging use the whole grid."""
        excess = max(layer.channels for layer in self.layers) / self.block_clusters
        return max(0, math.ceil(math.log(excess) / -math.log(_LEFT_BY_A_ROUND)))

    @property
    def masks(self) -> int:
        """The most masks of one batch."""
        return self.pairs * len(self.layers) * self.k_max

    @property
    def mask_parts(self) -> int:
        """How many blocks share a mask out."""
        return -(-self.size[0] * self.size[1] // self.block_pixels)

    @property
    def quantile(self) -> tuple[int, int, np.float32]:
        """The two ranks that θ lies between, and its share of the way from one to the other."""
        last = self.size[0] * self.size[1] - 1
        place = self.theta * last
        low = int(place)
        return low, min(low + 1, last), np.float32(place - low)

    def table(self) -> NDArray[np.int64]:
        """[L, 8] int64, a LayerRow for each layer."""
        sizes = [
            (layer.channels, layer.height * layer.width, _tiles(layer)) for layer in self.layers
        ]
        starts = accumulate(sizes, lambda a, b: (a[0] + b[0], a[1] + b[1], a[2] + b[2]))
        rows = [
            LayerRow(
                layer.channels, layer.height, layer.width, layer.features, layer.gradients, *start
            )
            for layer, start in zip(self.layers, [(0, 0, 0), *starts], strict=False)
        ]
        return np.array(rows, np.int64)

    def interpolation(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Find the source lines that each output row and column lies between.

        Pixels have half-pixel centres, and edges are repeated.

        Returns:
            Two arrays [L, H + W], rows before columns: the source line before each, int32, and the
            share of the next line, float32 in [0, 1).
        """
        height, width = self.size
        low = np.empty((len(self.layers), height + width), np.int32)
        share = np.empty(low.shape, np.float32)
        for number, layer in enumerate(self.layers):
            rows, columns = slice(0, height), slice(height, None)
            low[number, rows], share[number, rows] = neighbours(layer.height, height)
            low[number, columns], share[number, columns] = neighbours(layer.width, width)
        return low, share

    def split_sums(
        self, row: NDArray[np.float32], counts: NDArray[np.int32]
    ) -> tuple[NDArray[np.float32], ...]:
        """Cut a pair's collection sums into layers.

        Args:
            row: [s] float32, the pair's row of the array of sums.
            counts: [L] int32, the collections of each layer.

        Returns:
            For each layer [count, h, w] float32.
        """
        parts, start = [], 0
        for layer, count in zip(self.layers, counts.tolist(), strict=True):
            pixels = layer.height * layer.width
            part = row[start : start + count * pixels]
            parts.append(part.reshape(count, layer.height, layer.width))
            start += self.k_max * pixels
        return tuple(parts)

    def specs(self) -> Buffers[Spec]:
        """The shapes and types of the arrays that the kernels share."""
        pairs, layers, slots = self.pairs, len(self.layers), self.pairs * self.channels
        image, sums = self.size[0] * self.size[1], self.k_max * self.pixels
        return Buffers(
            table=Spec((layers, len(LayerRow._fields)), np.int64),
            low=Spec((layers, sum(self.size)), np.int32),
            share=Spec((layers, sum(self.size)), np.float32),
            slopes=Spec((pairs,), np.float32),
            psi=Spec((pairs, self.channels, 4), np.float32),
            scaled_psi=Spec((pairs, self.channels, 4), np.float32),
            exact=Spec((EXACT_ROWS, slots), np.float64),
            coarse=Spec((COARSE_ROWS, slots), np.float32),
            links=Spec((LINK_ROWS, slots), np.int32),
            scales=Spec((pairs, layers), np.float64),
            alive=Spec((pairs, layers, self.grid_rounds + 1), np.int32),
            stale=Spec((pairs, layers, self.grid_rounds + 1), np.int32),
            rounds=Spec((pairs, layers), np.int32),
            unscaled=Spec((pairs, sums), np.float64),
            finished=Spec((pairs, layers, self.k_max), np.int32, zeroed=True),
            histograms=Spec((self.masks, DIGITS, BINS), np.int32, zeroed=True),
            selected=Spec((self.masks, DIGITS, 2), np.int32),
            masks=Spec((self.masks, image), self.mask_dtype),
            owner_of_mask=Spec((self.masks,), np.int64),
            targets=Spec((pairs,), np.int64),
            labels=Spec((pairs, self.channels), np.int32),
            quality=Spec((pairs, layers, self.k_max), np.float32),
            sums=Spec((pairs, sums), np.float32),
            extremes=Spec((pairs, MAP_PARTS, 2), np.float32),
            raw=Spec((pairs, image), np.float32),
            saliency=Spec((pairs, image), np.float32),
            flat=Spec((self.masks,), np.uint8),
            scores=Spec((self.masks,), np.float32),
            weights=Spec((self.masks,), np.float32),
            counts=Spec((pairs, layers), np.int32),
            starts=Spec((pairs * layers + 1,), np.int32),
        )


def map_parts(pixels: int, threads: int) -> int:
    """How many blocks share a map out."""
    return min(-(-pixels // threads), MAP_PARTS)


def _tiles(layer: LayerPlace) -> int:
    return -(-layer.height * layer.width // TILE)


def neighbours(source: int, target: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Find the source lines that each of some lines lies between; see Geometry.interpolation.

    Args:
        source: How many lines are enlarged.
        target: To how many.

    Returns:
        Two arrays [target]: the source line before each, and the share of the next one.
    """
    centres = (np.arange(target) + 0.5) * (source / target) - 0.5
    centres = np.clip(centres, 0, source - 1)
    low = np.floor(centres).astype(np.intp)
    return low, centres - low

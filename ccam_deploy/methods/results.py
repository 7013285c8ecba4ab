"""What a method returns: maps, and the partitions, masks and weights behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import overload

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.errors import NotFiniteError
from ccam_deploy.kernels import cpu


@dataclass(frozen=True)
class LayerPartition:
    """The collections of a target layer's channels, for each of P (image, class) pairs.

    Attributes:
        name: The layer.
        labels: [P, C] int32, the collection of each channel.
        count: [P] int32, how many collections there are.
        quality: [P, k_max - k_min + 1] float32, the mean dispersion-separation ratio for each
            number of collections tried; -1 where there were too few distinct channels.
    """

    name: str
    labels: NDArray[np.int32]
    count: NDArray[np.int32]
    quality: Floats

    def take(self, rows: NDArray[np.intp]) -> LayerPartition:
        """Keep some of the pairs."""
        return LayerPartition(self.name, self.labels[rows], self.count[rows], self.quality[rows])


class MaskSequence(Sequence[Floats]):
    """The masks [N, H, W] float32 of each pair, drawn on access.

    Args:
        draws: A function for each pair, which draws its masks.
    """

    def __init__(self, draws: Sequence[Callable[[], Floats]]) -> None:
        self._draws = tuple(draws)

    def __len__(self) -> int:
        return len(self._draws)

    @overload
    def __getitem__(self, index: int) -> Floats: ...

    @overload
    def __getitem__(self, index: slice) -> MaskSequence: ...

    def __getitem__(self, index: int | slice) -> Floats | MaskSequence:
        if isinstance(index, slice):
            return MaskSequence(self._draws[index])
        return self._draws[index]()

    def take(self, rows: NDArray[np.intp]) -> MaskSequence:
        """Keep some of the pairs."""
        return MaskSequence([self._draws[row] for row in rows])

    def __add__(self, other: MaskSequence) -> MaskSequence:
        return MaskSequence(self._draws + other._draws)


@dataclass(frozen=True)
class MethodResult:
    """A method's result for P pairs.

    Attributes:
        raw_saliency: [P, H, W] float32, as the method defines it.
        saliency: [P, H, W] float32, each map scaled to [0, 1].
        layers: See Explanation.
        masks: See Explanation.
        weights: See Explanation.
        mic: See Explanation.
    """

    raw_saliency: Floats
    saliency: Floats
    layers: tuple[LayerPartition, ...]
    masks: MaskSequence
    weights: tuple[Floats, ...]
    mic: tuple[Floats, ...]

    @classmethod
    def of_maps(
        cls,
        raw: Floats,
        weights: Sequence[Floats] = (),
        mic: Sequence[Floats] = (),
        saliency: Floats | None = None,
    ) -> MethodResult:
        """Make the result of a method that keeps no masks.

        Args:
            raw: [P, H, W] float32, the maps.
            weights: [N] float32 for each pair, or nothing.
            mic: [N] float32 for each pair, or nothing.
            saliency: [P, H, W] float32, the maps scaled to [0, 1], where that is done.

        Raises:
            NotFiniteError: A map is not finite.
        """
        if not np.isfinite(raw).all():
            raise NotFiniteError(
                "the maps have NaN or infinite values for these images; "
                "a bundle in fp32 has the wider range"
            )
        none = [np.zeros(0, np.float32)] * len(raw)
        # Unlike a lambda, this lets results be pickled.
        masks = MaskSequence([partial(_no_masks, raw.shape[1:])] * len(raw))
        scaled = cpu.min_max(raw) if saliency is None else saliency
        return cls(raw, scaled, (), masks, tuple(weights or none), tuple(mic or none))

    @classmethod
    def joined(cls, parts: Sequence[MethodResult]) -> MethodResult:
        """Put the results of one method for different pairs together, in order."""
        if len(parts) == 1:
            return parts[0]
        masks = parts[0].masks
        for part in parts[1:]:
            masks = masks + part.masks
        return cls(
            np.concatenate([part.raw_saliency for part in parts]),
            np.concatenate([part.saliency for part in parts]),
            tuple(map(_join_layers, zip(*(part.layers for part in parts), strict=True))),
            masks,
            tuple(weights for part in parts for weights in part.weights),
            tuple(mic for part in parts for mic in part.mic),
        )

    def take(self, rows: NDArray[np.intp]) -> MethodResult:
        """Keep some of the pairs, in the order of `rows`."""
        return MethodResult(
            self.raw_saliency[rows],
            self.saliency[rows],
            tuple(layer.take(rows) for layer in self.layers),
            self.masks.take(rows),
            tuple(self.weights[row] for row in rows),
            tuple(self.mic[row] for row in rows),
        )


@dataclass(frozen=True)
class BatchResult:
    """The result of a method's run on a batch of B images and P pairs.

    Attributes:
        logits: [B, classes] float32, of the images.
        owner: [P] int64, the image of each pair, in ascending order.
        targets: [P] int64, the class of each pair; no pair comes twice.
        result: The method's result for the pairs.
    """

    logits: Floats
    owner: Classes
    targets: Classes
    result: MethodResult


def _no_masks(size: tuple[int, ...]) -> Floats:
    return np.zeros((0, *size), np.float32)


def _join_layers(parts: tuple[LayerPartition, ...]) -> LayerPartition:
    return LayerPartition(
        parts[0].name,
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.count for part in parts]),
        np.concatenate([part.quality for part in parts]),
    )

"""Collection-CAM (Ha & Youn, IEEE Access 2022) with the kernels of the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Classifier
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.errors import OptionError
from ccam_deploy.kernels import cpu
from ccam_deploy.methods.base import (
    Batch,
    Method,
    layer_names,
    not_finite,
    places_of,
    require_finite_masked,
)
from ccam_deploy.methods.results import LayerPartition, MaskSequence, MethodResult
from ccam_deploy.methods.scores import Score, require_score, score_gradient, score_of
from ccam_deploy.methods.stopwatch import Stopwatch

_MOST_COLLECTIONS = 1024


@dataclass(frozen=True)
class _Piece:
    """Some of a pair's masks, none of them flat, for the classifier.

    Attributes:
        pair: The pair.
        places: [n], the place of each mask among the pair's.
        masks: [n, H, W] float32 in [0, 1].
    """

    pair: int
    places: NDArray[np.intp]
    masks: Floats


@dataclass(frozen=True)
class CollectionCAM(Method):
    """Clusters feature maps into collections and weighs each collection's mask by its score.

    Ha & Youn, "Collection-CAM", IEEE Access 2022, algorithm 1. The defaults are the paper's where
    it gives a value.

    Attributes:
        theta: Mask values not above this quantile become 0; in [0, 1).
        k_min: The fewest collections that a layer may have.
        k_max: The most collections that a layer may have, at most 1024.
        score: What F_c is: the logit of the class, or its probability.
        standardise: Scale the channel statistics to equal deviation before they are clustered.
        layers: Use only these target layers; empty for all. The deepest counts as the final one.
        gate: In layers but the final one, the share of a channel's largest absolute gradient from
            which on a pixel counts in full; smaller positive gradients count in proportion. 0, as
            in the paper, counts every positive gradient in full, so that its rounding can switch a
            pixel on or off. In [0, 1].
    """

    name = "collection-cam"
    keeps_masks = True
    theta: float = 0.1
    k_min: int = 2
    k_max: int = 10
    score: Score = "logit"
    standardise: bool = False
    layers: tuple[str, ...] = ()
    gate: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", layer_names(self.layers))
        if not 0 <= self.theta < 1:
            raise OptionError(f"theta is {self.theta}; it must be in [0, 1)")
        if not 1 <= self.k_min <= self.k_max:
            raise OptionError(
                f"k_min is {self.k_min} and k_max {self.k_max}; 1 <= k_min <= k_max must hold"
            )
        if self.k_max > _MOST_COLLECTIONS:
            raise OptionError(f"k_max is {self.k_max}; it must be at most {_MOST_COLLECTIONS}")
        if not 0 <= self.gate <= 1:
            raise OptionError(f"gate is {self.gate}; it must be in [0, 1]")
        require_score(self.score)

    @property
    def has_device_kernels(self) -> bool:
        """Whether a GPU's kernels can run it with these options; else those of the CPU do."""
        return not self.gate

    def selected_layers(self, names: Sequence[str]) -> list[int]:
        """List the places of the layers that are used, the final one last.

        Args:
            names: The bundle's target layers, from the shallowest to the deepest.

        Raises:
            OptionError: A layer is not in the bundle.
        """
        return places_of(self.layers or names, names)

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain every pair of a batch; see Method."""
        selected_layers = self.selected_layers(batch.layers)
        with clock.stage("gradient"):
            activations = batch.activations.take(batch.owner)
            gradients = classifier.gradients(activations, self._output_gradient(batch))
        layers, sums = [], []
        for index in selected_layers:
            features = activations.features[index]
            final = index == selected_layers[-1]
            partition, maps = self._partition(
                batch.layers[index], features, gradients[index], final, clock
            )
            layers.append(partition)
            sums.append(maps)
        per_pair = list(zip(*sums, strict=True))
        weighted = cpu.SoftmaxSum(len(per_pair), batch.size)
        scores, counted = self._score(classifier, batch, per_pair, weighted, clock)
        with clock.stage("combine"):
            raw = weighted.result()
            weights = tuple(map(cpu.softmax, scores, counted))
            rows = np.broadcast_to(batch.baseline, (len(scores), len(batch.baseline)))
            base = score_of(self.score, rows, batch.targets, batch.activation)
            mic = tuple(
                np.where(is_counted, pair_scores - zero_score, np.float32(0))
                for pair_scores, is_counted, zero_score in zip(scores, counted, base, strict=True)
            )
            saliency = cpu.min_max(raw)
        draws = [partial(draw_masks, sums, batch.size, self.theta) for sums in per_pair]
        return MethodResult(raw, saliency, tuple(layers), MaskSequence(draws), weights, mic)

    def require_support(self, classifier: Classifier, batch: Batch) -> None:
        """Look up the layers; see Method."""
        self.selected_layers(batch.layers)

    def _output_gradient(self, batch: Batch) -> Floats:
        """The gradient of F_c at the logits, [P, classes] float32."""
        logits = batch.activations.logits[batch.owner]
        return score_gradient(self.score, logits, batch.targets, batch.activation)

    def _partition(
        self, name: str, features: Floats, gradients: Floats, final: bool, clock: Stopwatch
    ) -> tuple[LayerPartition, list[Floats]]:
        """Cluster a layer's channels and add up the collections, pair by pair."""
        with clock.stage("statistics"):
            psi = cpu.channel_statistics(features, gradients)
            if not np.isfinite(psi).all():
                raise not_finite(name)
            if self.standardise:
                psi = cpu.standardise(psi)
        with clock.stage("partition"):
            parts = [cpu.partition(row, self.k_min, self.k_max) for row in psi]
        with clock.stage("masks"):
            maps = [
                cpu.collection_sums(a, g, part.labels, part.count, final, self.gate)
                for a, g, part in zip(features, gradients, parts, strict=True)
            ]
        partition = LayerPartition(
            name,
            np.stack([part.labels for part in parts]),
            np.array([part.count for part in parts], np.int32),
            np.stack([part.quality for part in parts]),
        )
        return partition, maps

    def _score(
        self,
        classifier: Classifier,
        batch: Batch,
        per_pair: Sequence[tuple[Floats, ...]],
        weighted: cpu.SoftmaxSum,
        clock: Stopwatch,
    ) -> tuple[list[Floats], list[NDArray[np.bool_]]]:
        """Run the classifier on all masks in full chunks, and add each up once it has its score.

        Returns:
            For each pair its scores [N] float32, and which of its masks count [N] bool: all but
            flat ones.
        """
        counts = [sum(len(maps) for maps in sums) for sums in per_pair]
        scores = [np.zeros(count, np.float32) for count in counts]
        counted = [np.zeros(count, np.bool_) for count in counts]
        for pieces in _packed(self._pieces(batch, per_pair, clock), batch.chunk):
            with clock.stage("classifier"):
                masks = np.concatenate([piece.masks for piece in pieces])
                pairs = np.repeat([p.pair for p in pieces], [len(p.masks) for p in pieces])
                logits = classifier.masked_logits(batch.images, masks, batch.owner[pairs])
                require_finite_masked(logits)
            with clock.stage("combine"):
                chunk_scores = score_of(self.score, logits, batch.targets[pairs], batch.activation)
                start = 0
                for piece in pieces:
                    piece_scores = chunk_scores[start : start + len(piece.masks)]
                    start += len(piece.masks)
                    scores[piece.pair][piece.places] = piece_scores
                    counted[piece.pair][piece.places] = True
                    weighted.add(piece.pair, piece_scores, piece.masks)
        return scores, counted

    def _pieces(
        self, batch: Batch, per_pair: Sequence[tuple[Floats, ...]], clock: Stopwatch
    ) -> Iterator[_Piece]:
        """Draw the masks of all pairs, a chunk at a time, without the flat ones."""
        for pair, sums in enumerate(per_pair):
            place = 0
            for maps in sums:
                for rows in row_chunks(len(maps), batch.chunk):
                    with clock.stage("masks"):
                        masks, flat = cpu.render_masks(maps[rows], batch.size, self.theta)
                        kept = np.flatnonzero(~flat)
                    if len(kept):
                        drawn = masks if kept.size == len(masks) else masks[kept]
                        yield _Piece(pair, place + rows.start + kept, drawn)
                place += len(maps)


def draw_masks(sums: Sequence[Floats], size: tuple[int, int], theta: float) -> Floats:
    """Draw all masks of a pair.

    Args:
        sums: [k, h, w] float32 for each layer, the sums of its collections.
        size: Height and width of the masks.
        theta: Mask values not above this quantile become 0; in [0, 1).

    Returns:
        [N, H, W] float32 in [0, 1].
    """
    return np.concatenate([cpu.render_masks(maps, size, theta)[0] for maps in sums])


def _packed(pieces: Iterator[_Piece], size: int) -> Iterator[list[_Piece]]:
    """Regroup pieces so that every group but the last holds exactly `size` masks."""
    group: list[_Piece] = []
    room = size
    for piece in pieces:
        while len(piece.masks) >= room:
            yield [*group, _Piece(piece.pair, piece.places[:room], piece.masks[:room])]
            piece = _Piece(piece.pair, piece.places[room:], piece.masks[room:])
            group, room = [], size
        if len(piece.masks):
            group.append(piece)
            room -= len(piece.masks)
    if group:
        yield group

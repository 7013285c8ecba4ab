"""Score-CAM (Wang et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Classes, Doubles, Floats
from ccam_deploy.bundle.manifest import Activation
from ccam_deploy.engines import Classifier
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.errors import OptionError
from ccam_deploy.kernels import cpu
from ccam_deploy.methods.base import Batch, Method, not_finite, require_finite_masked
from ccam_deploy.methods.results import MethodResult
from ccam_deploy.methods.scores import Score, score_of
from ccam_deploy.methods.stopwatch import Stopwatch

Weighting = Literal["increase", "probability", "softmax"]


@dataclass(frozen=True)
class ScoreCAM(Method):
    """Weighs each channel by the score of the image under its mask (Wang et al. 2020).

    Attributes:
        layer: The target layer; empty for the final one.
        weights: The weight of a channel. "increase": by how much the logit under its mask exceeds
            that of an input of zeros (Ha & Youn 2022, eq. 1-3). "probability": the softmax
            probability under its mask, as in the code of Score-CAM's authors. "softmax": the
            softmax of the logits over all channels, as in TorchCAM and pytorch-grad-cam, whose
            masks differ a little: TorchCAM scales them before it enlarges them, and
            pytorch-grad-cam aligns corners.
        channels: Use only so many channels, those that vary most over the image; 0 for all.
    """

    name = "score-cam"
    layer: str = ""
    weights: Weighting = "increase"
    channels: int = 0

    def __post_init__(self) -> None:
        if self.weights not in ("increase", "probability", "softmax"):
            raise OptionError(
                f'weights is "{self.weights}"; it must be increase, probability or softmax'
            )
        if self.channels < 0:
            raise OptionError(f"channels is {self.channels}; it must be at least 0")

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain every pair of a batch; see Method."""
        place = batch.place_of(self.layer)
        features = batch.activations.features[place]
        if not np.isfinite(features[batch.owner]).all():
            raise not_finite(batch.layers[place])
        scores, counted = self._score(classifier, batch, features, clock)
        with clock.stage("combine"):
            base = self.base_scores(batch.baseline, batch.targets, batch.activation)[:, None]
            gains = np.where(counted, scores - base, np.float32(0))
            if self.weights == "softmax":
                weights = np.stack(list(map(cpu.softmax, scores, counted)))
            else:
                weights = gains if self.weights == "increase" else scores
            pairs = zip(weights, batch.owner, strict=True)
            maps = [np.einsum("c,cij->ij", row, features[image]) for row, image in pairs]
            raw = cpu.upsample(np.maximum(np.stack(maps), 0), batch.size)
            return MethodResult.of_maps(raw, list(weights), list(gains))

    def require_support(self, classifier: Classifier, batch: Batch) -> None:
        """Look up the layer; see Method."""
        batch.place_of(self.layer)

    @property
    def score(self) -> Score:
        """What a channel is scored by."""
        return "probability" if self.weights == "probability" else "logit"

    def base_scores(self, baseline: Floats, targets: Classes, activation: Activation) -> Floats:
        """Score an input of zeros for each pair.

        Args:
            baseline: [classes] float32, its logits.
            targets: [P] int64, the class of each pair.
            activation: What makes probabilities of logits.

        Returns:
            [P] float32.
        """
        rows = np.broadcast_to(baseline, (len(targets), len(baseline)))
        return score_of(self.score, rows, targets, activation)

    def most_varied(self, spread: Doubles) -> NDArray[np.intp]:
        """Choose the channels to use among those that are not flat.

        Args:
            spread: [n] float64, how much each varies over the image.

        Returns:
            Their places among the n, in ascending order.
        """
        most = self.channels
        if not most or len(spread) <= most:
            return np.arange(len(spread))
        return np.sort(np.argsort(-spread, kind="stable")[:most])

    def _score(
        self, classifier: Classifier, batch: Batch, features: Floats, clock: Stopwatch
    ) -> tuple[Floats, NDArray[np.bool_]]:
        """Score each channel's mask.

        Returns:
            [P, C] float32, 0 for channels that are not scored, and [P, C] bool, which are: not
            flat ones, whose masks are empty, nor those beyond the number of channels to use.
        """
        scores = np.zeros((len(batch.owner), features.shape[1]), np.float32)
        counted = np.zeros(scores.shape, np.bool_)
        with clock.stage("masks"):
            distinct = np.unique(batch.owner)
            per_image = [self._channels(features[image]) for image in distinct]
            images = np.repeat(distinct, list(map(len, per_image)))
            channels = np.concatenate(per_image)
        for rows in row_chunks(len(images), batch.chunk):
            image, channel = images[rows], channels[rows]
            with clock.stage("masks"):
                masks = cpu.min_max(cpu.upsample(features[image, channel], batch.size))
                shown, owner = np.unique(image, return_inverse=True)
            with clock.stage("classifier"):
                logits = classifier.masked_logits(batch.images[shown], masks, owner)
                require_finite_masked(logits)
            with clock.stage("combine"):
                for pair in np.flatnonzero(np.isin(batch.owner, shown)):
                    masked = image == batch.owner[pair]
                    classes = np.full(np.count_nonzero(masked), batch.targets[pair])
                    values = score_of(self.score, logits[masked], classes, batch.activation)
                    scores[pair, channel[masked]] = values
                    counted[pair, channel[masked]] = True
        return scores, counted

    def _channels(self, features: Floats) -> NDArray[np.intp]:
        """Choose the channels of an image's features [C, h, w] to use, in ascending order."""
        flat = features.reshape(len(features), -1)
        varied = np.flatnonzero(flat.max(axis=1) > flat.min(axis=1))
        if not self.channels or len(varied) <= self.channels:
            return varied
        spread = flat[varied].std(axis=1, dtype=np.float64)
        return varied[self.most_varied(spread)]

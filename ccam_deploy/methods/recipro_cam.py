"""Recipro-CAM (Byun & Lee 2022): the classifier's head on one place of its features at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ccam_deploy.engines import Classifier
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.kernels import cpu
from ccam_deploy.methods.base import Batch, Method, not_finite, require_finite_masked
from ccam_deploy.methods.results import MethodResult
from ccam_deploy.methods.scores import Score, require_score, score_of
from ccam_deploy.methods.stopwatch import Stopwatch


@dataclass(frozen=True)
class ReciproCAM(Method):
    """Scores each place of the last feature map by the head's score for that place alone.

    It needs no gradient, and all classes of an image share its passes through the head. Tokens
    that have no place in the map, such as a class token, stay the image's own.

    Attributes:
        score: The score of a place: the probability of the class, as in the authors'
            code, or its logit, as in OpenVINO XAI.
    """

    name = "recipro-cam"
    score: Score = "probability"

    def __post_init__(self) -> None:
        require_score(self.score)

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain every pair of a batch; see Method."""
        features, rest = batch.activations.features[-1], batch.activations.rest
        channels, height, width = features.shape[1:]
        if not np.isfinite(features[batch.owner]).all():
            raise not_finite(batch.layers[-1])
        maps = np.zeros((len(batch.owner), height * width), np.float32)
        for image in np.unique(batch.owner):
            pairs = np.flatnonzero(batch.owner == image)
            flat = features[image].reshape(channels, -1)
            for rows in row_chunks(height * width, batch.chunk):
                with clock.stage("masks"):
                    places = np.arange(rows.start, rows.stop)
                    alone = np.zeros((len(places), channels, height * width), np.float32)
                    alone[np.arange(len(places)), :, places] = flat[:, places].T
                with clock.stage("classifier"):
                    others = None if rest is None else rest[np.full(len(places), image)]
                    maps_alone = alone.reshape(-1, channels, height, width)
                    logits = classifier.head_logits(maps_alone, others)
                    require_finite_masked(logits)
                with clock.stage("combine"):
                    for pair in pairs:
                        classes = np.full(len(places), batch.targets[pair])
                        maps[pair, places] = score_of(self.score, logits, classes, batch.activation)
        with clock.stage("combine"):
            raw = cpu.upsample(maps.reshape(-1, height, width), batch.size)
            return MethodResult.of_maps(raw)

    def require_support(self, classifier: Classifier, batch: Batch) -> None:
        """Run the head once; see Method."""
        classifier.head_logits(batch.activations.features[-1], batch.activations.rest)

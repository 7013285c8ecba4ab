"""The tensors that an explanation becomes in a response, and what is counted of it."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Floats
from ccam_deploy.explanation import Explanation
from ccam_deploy.methods import RISE, CollectionCAM, ReciproCAM, ScoreCAM
from ccam_deploy.methods.scores import probabilities
from ccam_deploy.serve.requests import Outputs


def outputs_of(weights_shape: tuple[int, int] | None) -> Outputs:
    """List the tensors that a model can give, and how each is made.

    Args:
        weights_shape: Layers and the most collections of one, as Collection-CAM's options say;
            None where the model does not have it.
    """
    always: Outputs = {"SALIENCY": _saliency, "SCORES": _scores, "CLASS": _class}
    if weights_shape is None:
        return always
    return {
        **always,
        "WEIGHTS": partial(_weights, shape=weights_shape),
        "COLLECTIONS": partial(_collections, layers=weights_shape[0]),
    }


def _saliency(explanation: Explanation) -> Floats:
    return explanation.saliency


def _scores(explanation: Explanation) -> Floats:
    """The probability of each class, [P, classes] float32; outputs as they are where that is so."""
    logits = explanation.logits[explanation.image_index].astype(np.float64)
    activation = explanation.source.manifest.probabilities_by
    return probabilities(logits, activation).astype(np.float32)


def _class(explanation: Explanation) -> NDArray[np.int32]:
    return explanation.targets.astype(np.int32)[:, None]


def _weights(explanation: Explanation, shape: tuple[int, int]) -> Floats:
    """The weights α of each layer's collections, [P, layers, k_max] float32, 0 behind the last."""
    padded = np.zeros((len(explanation), *shape), np.float32)
    for pair, weights in enumerate(explanation.weights if explanation.layers else ()):
        ends = np.cumsum([layer.count[pair] for layer in explanation.layers])[:-1]
        for row, part in zip(padded[pair], np.split(weights, ends), strict=True):
            row[: len(part)] = part
    return padded


def _collections(explanation: Explanation, layers: int) -> NDArray[np.int32]:
    """How many collections each layer has, [P, layers] int32; 0 for methods that make none."""
    if not explanation.layers:
        return np.zeros((len(explanation), layers), np.int32)
    return np.stack([layer.count for layer in explanation.layers], axis=1)


def masked_forwards(explanation: Explanation) -> list[int]:
    """Count the masked images, or feature maps, that the classifier ran on for each pair.

    Args:
        explanation: Of one class for each image.

    Returns:
        A number for each pair; 0 for methods that mask nothing.
    """
    method = explanation.settings["method"]
    if method == CollectionCAM.name:  # a flat mask has no weight, and is not run
        return [int(np.count_nonzero(weights)) for weights in explanation.weights]
    if method == ScoreCAM.name:
        return [int(np.count_nonzero(gains)) for gains in explanation.mic]
    each = 0
    if method == RISE.name:
        each = explanation.settings["options"]["masks"]
    elif method == ReciproCAM.name:
        last = explanation.source.manifest.layers[-1]
        each = last.height * last.width
    return [each] * len(explanation)

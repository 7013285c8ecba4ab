"""The score F_c of a class, and the probabilities of logits, which it may be one of."""

from __future__ import annotations

from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.bundle.manifest import Activation
from ccam_deploy.errors import OptionError

Score = Literal["logit", "probability"]
Scoring = Literal["logit", "softmax", "sigmoid"]
F = TypeVar("F", np.float32, np.float64)


def require_score(score: str) -> None:
    """Refuse a score that is not among `Score`.

    Raises:
        OptionError: The score is unknown.
    """
    if score not in ("logit", "probability"):
        raise OptionError(f'score is "{score}"; it must be logit or probability')


def scoring(score: Score, activation: Activation) -> Scoring:
    """Tell how a score is computed of logits.

    Args:
        score: What F_c is.
        activation: What makes probabilities of logits.
    """
    return "logit" if score == "logit" or activation == "none" else activation


def score_of(score: Score, logits: Floats, targets: Classes, activation: Activation) -> Floats:
    """Compute the score F_c of each row.

    Args:
        score: What F_c is: the logit of the class, or its probability.
        logits: [n, classes] float32.
        targets: [n] int64, the class of each row.
        activation: What makes probabilities of logits.

    Returns:
        [n] float32.
    """
    values = logits if score == "logit" else probabilities(logits, activation)
    scores: Floats = values[np.arange(len(targets)), targets]
    return scores


def probabilities(logits: NDArray[F], activation: Activation) -> NDArray[F]:
    """Compute the probability of each class.

    Args:
        logits: [n, classes].
        activation: What makes probabilities of logits; "none" leaves them as they are.

    Returns:
        [n, classes] of the same type; in [0, 1] unless the activation is "none".
    """
    if activation == "none":
        return logits
    shares: NDArray[F] = expit(logits) if activation == "sigmoid" else softmax(logits, axis=1)
    return shares


def score_gradient(
    score: Score, logits: Floats, targets: Classes, activation: Activation
) -> Floats:
    """Compute the gradient of each row's score F_c with respect to the logits.

    Args:
        score: What F_c is.
        logits: [n, classes] float32.
        targets: [n] int64, the class of each row.
        activation: What makes probabilities of logits.

    Returns:
        [n, classes] float32.
    """
    rows = np.arange(len(targets))
    one_hot = np.zeros(logits.shape, np.float32)
    one_hot[rows, targets] = 1
    how = scoring(score, activation)
    if how == "logit":
        return one_hot
    if how == "sigmoid":  # a product without a difference, whose digits would be lost near 1
        slopes: Floats = one_hot * expit(logits) * expit(-logits)
        return slopes
    shares = probabilities(logits, "softmax")
    own = shares[rows, targets][:, None]
    shares[rows, targets] = 0  # what 1 less its own share is, with all digits
    gradient: Floats = own * (one_hot * shares.sum(axis=1, keepdims=True) - shares)
    return gradient

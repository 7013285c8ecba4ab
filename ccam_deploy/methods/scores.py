"""The score F_c of a class, which methods read off the classifier's logits."""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.special import softmax

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.errors import OptionError

Score = Literal["logit", "probability"]


def require_score(score: str) -> None:
    """Refuse a score that is not among `Score`.

    Raises:
        OptionError: The score is unknown.
    """
    if score not in ("logit", "probability"):
        raise OptionError(f'score is "{score}"; it must be logit or probability')


def score_of(score: Score, logits: Floats, targets: Classes) -> Floats:
    """Compute the score F_c of each row.

    Args:
        score: What F_c is: the logit of the class, or its softmax probability.
        logits: [n, classes] float32.
        targets: [n] int64, the class of each row.

    Returns:
        [n] float32.
    """
    values = logits if score == "logit" else probabilities(logits)
    scores: Floats = values[np.arange(len(targets)), targets]
    return scores


def probabilities(logits: Floats) -> Floats:
    """Compute the softmax of each row of logits.

    Args:
        logits: [n, classes] float32.

    Returns:
        [n, classes] float32 in [0, 1].
    """
    shares: Floats = softmax(logits, axis=1)
    return shares

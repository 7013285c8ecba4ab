"""The score F_c that a method asks of the classifier."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Floats
from ccam_deploy.errors import OptionError

Score = Literal["logit", "probability"]


def require_score(score: str) -> None:
    """Raise OptionError for a score that does not exist."""
    if score not in ("logit", "probability"):
        raise OptionError(f'score is "{score}"; it must be logit or probability')


def score_of(score: Score, logits: Floats, targets: NDArray[np.int64]) -> Floats:
    """F_c of each row: logits [n, classes] float32, targets [n]; returns [n] float32."""
    values = logits if score == "logit" else probabilities(logits)
    scores: Floats = values[np.arange(len(targets)), targets]
    return scores


def probabilities(logits: Floats) -> Floats:
    """Softmax of each row of logits [n, classes] float32."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Floats = shifted / shifted.sum(axis=1, keepdims=True)
    return shares

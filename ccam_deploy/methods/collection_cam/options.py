"""Options of Collection-CAM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ccam_deploy.errors import OptionError
from ccam_deploy.methods.base import (
    places_of,
)
from ccam_deploy.methods.scores import Score, check_score

_MOST_COLLECTIONS = 1024


@dataclass(frozen=True)
class CollectionCAMOptions:
    """Options of Collection-CAM; the defaults are the paper's where it gives a value.

    theta: mask values not above this quantile become 0; in [0, 1).
    k_min, k_max: the numbers of collections that each layer may have.
    score: what F_c is, the logit of the class or its softmax probability.
    standardise: scale the channel statistics to equal deviation before they are clustered.
    layers: use only these target layers; empty for all. The deepest is treated as the final one.
    """

    theta: float = 0.1
    k_min: int = 2
    k_max: int = 10
    score: Score = "logit"
    standardise: bool = False
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.theta < 1:
            raise OptionError(f"theta is {self.theta}; it must be in [0, 1)")
        if not 1 <= self.k_min <= self.k_max:
            raise OptionError(
                f"k_min is {self.k_min} and k_max {self.k_max}; 1 <= k_min <= k_max must hold"
            )
        if self.k_max > _MOST_COLLECTIONS:
            raise OptionError(f"k_max is {self.k_max}; it must be at most {_MOST_COLLECTIONS}")
        check_score(self.score)


def chosen_layers(options: CollectionCAMOptions, names: Sequence[str]) -> list[int]:
    """The places of the layers that the options ask for, the final one last.

    Raises OptionError for one that is not there.
    """
    return places_of(options.layers or names, names)

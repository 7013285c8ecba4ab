"""What Collection-CAM costs here, as measured, by its number of masks; the k_max of a time budget.

Only whole explanations are timed, so that whatever an engine, a batch or a GPU adds is counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ccam_deploy.arrays import Doubles
from ccam_deploy.errors import OptionError
from ccam_deploy.methods.collection_cam.cpu import CollectionCAM
from ccam_deploy.methods.collection_cam.options import CollectionCAMOptions, chosen_layers

_WARM_ROUNDS = 2
"""A GPU launches work piece by piece the first time, and captures it the second."""
_ROUNDS = 3
_PERCENTILE = 90

Run = Callable[[CollectionCAMOptions], int]
"""Explains once with some options; gives how many masks went through the classifier."""


@dataclass(frozen=True)
class Cost:
    """Seconds of one call, from the prepared images to the result.

    fixed: of all that k_max does not change.   per_number: of each number of collections that is
    tried.   per_mask: of each mask: drawn, sent through the classifier, added up.
    margin: nine of ten measured calls took at most so many times what the three give.
    """

    fixed: float
    per_number: float
    per_mask: float
    margin: float

    def seconds(self, numbers: Doubles, masks: Doubles) -> Doubles:
        """Seconds for some numbers of collections tried and some numbers of masks, alike long."""
        return self.margin * (self.fixed + self.per_number * numbers + self.per_mask * masks)


@dataclass(frozen=True)
class Budget:
    """What a call was given and is expected to take, in milliseconds.

    k_max: the one that was chosen.   k_max_asked: the options' own, which is at least that.
    """

    ms: float
    predicted_ms: float
    k_max: int
    k_max_asked: int


def measure(run: Run, options: CollectionCAMOptions, now: Callable[[], float]) -> Cost:
    """Time calls with few and many masks in turn, and fit their cost.

    Some are forced to a number of collections; one chooses its own, as explanations do.
    """
    from scipy.optimize import nnls

    most = options.k_max
    ranges = dict.fromkeys([(1, 1), (-(-most // 2),) * 2, (most, most), (options.k_min, most)])
    tried = [replace(options, k_min=low, k_max=high) for low, high in ranges]
    for _ in range(_WARM_ROUNDS):
        masks = [run(one) for one in tried]
    seconds = np.empty((_ROUNDS, len(tried)))
    for row in seconds:
        for place, one in enumerate(tried):
            started = now()
            run(one)
            row[place] = now() - started
    terms = np.array(
        [[1.0, high - low + 1, n] for (low, high), n in zip(ranges, masks, strict=True)]
    )
    # Errors count by their share, for a call that takes longer varies more.
    typical = np.median(seconds, axis=0)
    parts, _ = nnls(terms / typical[:, None], np.ones(len(typical)))
    margin = float(np.percentile(seconds / (terms @ parts), _PERCENTILE))
    fixed, per_number, per_mask = map(float, parts)
    return Cost(fixed, per_number, per_mask, max(1.0, margin))


class Costs:
    """The costs of an explainer's calls, each measured when it is first asked for, or anew.

    channels: of each target layer, by its name.   rehearse: gives a call on stand-ins for some
    images and (image, class) pairs.   Safe to use from several threads: they wait for what one of
    them measures.
    """

    def __init__(
        self,
        channels: Mapping[str, int],
        rehearse: Callable[[int, int], Run],
        now: Callable[[], float],
    ) -> None:
        self._channels = dict(channels)
        self._rehearse = rehearse
        self._now = now
        self._lock = threading.Lock()
        self._known: dict[tuple[object, ...], Cost] = {}

    def of(
        self, images: int, pairs: int, options: CollectionCAMOptions, anew: bool = False
    ) -> Cost:
        """The cost of a call on some images and (image, class) pairs.

        Options that change what is computed, and not how much, do not count.
        anew: measure it even if it was measured before.
        """
        key = images, pairs, options.k_min, options.k_max, options.layers
        with self._lock:
            if anew or key not in self._known:
                run = self._rehearse(images, pairs)
                self._known[key] = measure(run, options, self._now)
            return self._known[key]

    def predict(self, parts: Sequence[tuple[int, int]], options: CollectionCAMOptions) -> Doubles:
        """Seconds that a call takes at most, for each k_max from the options' k_min to k_max.

        parts: images and pairs of what the call does one after the other.
        Every layer is taken to have as many collections as it may.
        """
        names = list(self._channels)
        channels = np.array([self._channels[names[i]] for i in chosen_layers(options, names)])
        ks = np.arange(options.k_min, options.k_max + 1)
        numbers = (ks - options.k_min + 1).astype(np.float64)
        masks = np.minimum(ks[:, None], channels).sum(axis=1).astype(np.float64)
        total = np.zeros(len(ks))
        for images, pairs in parts:
            total += self.of(images, pairs, options).seconds(numbers, pairs * masks)
        return total

    def within(
        self,
        budget_ms: float,
        spent: float,
        parts: Sequence[tuple[int, int]],
        options: CollectionCAMOptions,
    ) -> tuple[CollectionCAMOptions, Budget]:
        """The options with the largest k_max, up to their own, that a call has time for.

        spent: seconds of the budget that are over.   parts: see `predict`.
        Raises OptionError where there is not even time for k_min.
        """
        predicted = 1000 * (spent + self.predict(parts, options))
        fitting = int(np.count_nonzero(predicted <= budget_ms))
        if not fitting:
            raise OptionError(
                f"budget_ms is {budget_ms:g}; with k_max {options.k_min}, the least, this call is "
                f"expected to take {predicted[0]:.1f} ms"
            )
        k_max = options.k_min + fitting - 1
        told = Budget(float(budget_ms), float(predicted[fitting - 1]), k_max, options.k_max)
        return replace(options, k_max=k_max), told


def check_budget(budget_ms: float | None, method: str) -> None:
    """Raise OptionError for a budget that is none, or of a method that cannot keep one."""
    if budget_ms is None:
        return
    if method != CollectionCAM.name:
        raise OptionError(f"a budget is kept by {CollectionCAM.name} alone; the method is {method}")
    if not 0 < budget_ms < float("inf"):
        raise OptionError(f"budget_ms is {budget_ms:g}; it must be above 0 and finite")

"""The measured cost of Collection-CAM by its number of masks, and the k_max of a time budget.

Only whole explanations are timed, so that the cost includes all that an engine, a batch or a GPU
adds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ccam_deploy.arrays import Doubles
from ccam_deploy.errors import OptionError
from ccam_deploy.methods.base import Method
from ccam_deploy.methods.collection_cam.cpu import CollectionCAM

_ROUNDS = 3
_PERCENTILE = 90

Run = Callable[[CollectionCAM], int]
"""Explains once; returns how many masks went through the classifier."""


@dataclass(frozen=True)
class Cost:
    """The time of a call, from the prepared images to the result.

    Attributes:
        fixed: Seconds that do not depend on k_max.
        per_number: Seconds for each number of collections that is tried.
        per_mask: Seconds for each mask: to draw it, run the classifier on it, and add it up.
        margin: Nine of ten measured calls took at most this factor times the predicted seconds.
    """

    fixed: float
    per_number: float
    per_mask: float
    margin: float

    def seconds(self, numbers: Doubles, masks: Doubles) -> Doubles:
        """Predict the seconds of several calls.

        Args:
            numbers: [N] float64, how many numbers of collections each call tries.
            masks: [N] float64, how many masks each call has.

        Returns:
            [N] float64.
        """
        return self.margin * (self.fixed + self.per_number * numbers + self.per_mask * masks)


@dataclass(frozen=True)
class Budget:
    """The budget of a call and the time that the call is expected to take.

    Attributes:
        ms: The budget, in milliseconds.
        predicted_ms: The most that the call is expected to take, in milliseconds.
        k_max: The largest k_max that fits.
        k_max_asked: The method's k_max, at least as large.
    """

    ms: float
    predicted_ms: float
    k_max: int
    k_max_asked: int


def measure(run: Run, method: CollectionCAM, now: Callable[[], float]) -> Cost:
    """Time calls with few and with many masks in turn, and fit their cost.

    Most calls try a single number of collections; one tries the method's range, as explanations
    do. Before each call that counts there is one of the same kind: a GPU's classifier begins with
    as many masks as the call before had.

    Args:
        run: Explains once.
        method: The method whose calls are measured, up to its k_max.
        now: Seconds on a clock that only goes forward.
    """
    from scipy.optimize import nnls

    most = method.k_max
    # The largest k_max comes first: a GPU makes its buffers for it once.
    ranges = dict.fromkeys([(method.k_min, most), (most, most), (-(-most // 2),) * 2, (1, 1)])
    tried = [replace(method, k_min=low, k_max=high) for low, high in ranges]
    # A GPU's first call launches its work piece by piece, and the second captures it.
    masks = [run(trial) for trial in tried]
    seconds = np.empty((_ROUNDS, len(tried)))
    for row in seconds:
        for place, trial in enumerate(tried):
            run(trial)
            started = now()
            run(trial)
            row[place] = now() - started
    terms = np.array(
        [[1.0, high - low + 1, n] for (low, high), n in zip(ranges, masks, strict=True)]
    )
    # Errors count relative to the time, because a call that takes longer also varies more.
    typical = np.median(seconds, axis=0)
    parts, _ = nnls(terms / typical[:, None], np.ones(len(typical)))
    margin = float(np.percentile(seconds / (terms @ parts), _PERCENTILE))
    fixed, per_number, per_mask = map(float, parts)
    return Cost(fixed, per_number, per_mask, max(1.0, margin))


class Costs:
    """The costs of an explainer's calls, each measured when it is first needed, or on request.

    Safe to use from several threads: while one measures, the others wait.

    Args:
        channels: The number of channels of each target layer, by its name.
        rehearse: Takes numbers of images and (image, class) pairs, and returns a call on noise
            with as many.
        now: Seconds on a clock that only goes forward.
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

    def of(self, images: int, pairs: int, method: CollectionCAM, anew: bool = False) -> Cost:
        """Give the cost of a call on some images and (image, class) pairs.

        Methods whose options need the same computation share a measurement.

        Args:
            images: How many images the call has.
            pairs: How many (image, class) pairs the call has.
            method: The method of the call.
            anew: Measure again even if a measurement exists.
        """
        k_range = method.k_min, method.k_max
        key = images, pairs, k_range, method.layers, method.has_device_kernels
        with self._lock:
            if anew or key not in self._known:
                run = self._rehearse(images, pairs)
                self._known[key] = measure(run, method, self._now)
            return self._known[key]

    def predict(self, parts: Sequence[tuple[int, int]], method: CollectionCAM) -> Doubles:
        """Predict the longest time of a call for each k_max from the method's k_min up.

        Every layer is assumed to have k_max collections, or as many as it has channels.

        Args:
            parts: Numbers of images and pairs of each batch that the call runs in turn.
            method: The method of the call.

        Returns:
            [k_max - k_min + 1] float64, seconds.
        """
        names = list(self._channels)
        channels = np.array([self._channels[names[i]] for i in method.selected_layers(names)])
        ks = np.arange(method.k_min, method.k_max + 1)
        numbers = (ks - method.k_min + 1).astype(np.float64)
        masks = np.minimum(ks[:, None], channels).sum(axis=1).astype(np.float64)
        total = np.zeros(len(ks))
        for images, pairs in parts:
            total += self.of(images, pairs, method).seconds(numbers, pairs * masks)
        return total

    def within(
        self,
        budget_ms: float,
        spent: float,
        parts: Sequence[tuple[int, int]],
        method: CollectionCAM,
    ) -> tuple[CollectionCAM, Budget]:
        """Lower a method's k_max to the largest with which a call keeps its budget.

        Args:
            budget_ms: Milliseconds that the call may take.
            spent: Seconds of the budget that have passed.
            parts: As for `predict`.
            method: The method of the call.

        Returns:
            The method with the k_max that fits, and the budget.

        Raises:
            OptionError: Not even k_min fits.
        """
        predicted = 1000 * (spent + self.predict(parts, method))
        fitting = int(np.count_nonzero(predicted <= budget_ms))
        if not fitting:
            raise OptionError(
                f"budget_ms is {budget_ms:g}; with k_max {method.k_min}, the least, this call is "
                f"expected to take {predicted[0]:.1f} ms"
            )
        k_max = method.k_min + fitting - 1
        budget = Budget(float(budget_ms), float(predicted[fitting - 1]), k_max, method.k_max)
        return replace(method, k_max=k_max), budget


def budgeted(method: Method) -> CollectionCAM:
    """Return the method where it can keep a budget.

    Raises:
        OptionError: The method is not Collection-CAM.
    """
    if not isinstance(method, CollectionCAM):
        raise OptionError(
            f"a budget is kept by {CollectionCAM.name} alone; the method is {method.name}"
        )
    return method


def validate_budget(budget_ms: float | None, method: Method) -> None:
    """Refuse a budget that is not a time, or that the method cannot keep.

    Raises:
        OptionError: The budget is not above 0 and finite, or the method is not Collection-CAM.
    """
    if budget_ms is None:
        return
    budgeted(method)
    if not 0 < budget_ms < float("inf"):
        raise OptionError(f"budget_ms is {budget_ms:g}; it must be above 0 and finite")

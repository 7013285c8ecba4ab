"""The cost of explanations as it is fitted to measured ones, against costs that are known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from ccam_deploy.errors import OptionError
from ccam_deploy.methods import RISE, CollectionCAM
from ccam_deploy.methods.collection_cam.cost import Costs, Run, measure, validate_budget
from tests.clock import FakeClock

CHANNELS = {"low": 4, "middle": 40, "high": 40}


class Network:
    """Explanations that take a known time, in rounds that are slow by some factors."""

    def __init__(
        self, fixed: float, per_number: float, per_mask: float, slow: Sequence[float] = (1.0,)
    ) -> None:
        self.clock = FakeClock()
        self.rates = fixed, per_number, per_mask
        self.slow = list(slow)
        self.asked: list[tuple[int, int]] = []

    def __call__(self, options: CollectionCAM) -> int:
        """Layers take as many collections as they may, one mask of each is flat."""
        low, high = options.k_min, options.k_max
        factor = self.slow[self.asked.count((low, high)) % len(self.slow)]
        self.asked.append((low, high))
        masks = sum(min(high, channels) - 1 for channels in CHANNELS.values())
        self.clock.time += factor * self.seconds(high - low + 1, masks)
        return masks

    def seconds(self, numbers: int, masks: int) -> float:
        fixed, per_number, per_mask = self.rates
        return fixed + per_number * numbers + per_mask * masks


@pytest.mark.parametrize("rates", [(5.0, 0.25, 1.0), (5.0, 0.0, 0.5), (0.0, 0.5, 2.0)])
@pytest.mark.parametrize(("k_min", "k_max"), [(2, 10), (1, 7), (3, 32)])
def test_known_costs_are_found(rates: tuple[float, float, float], k_min: int, k_max: int) -> None:
    network = Network(*rates)
    cost = measure(network, CollectionCAM(k_min=k_min, k_max=k_max), network.clock)
    assert (cost.fixed, cost.per_number, cost.per_mask) == pytest.approx(rates, abs=1e-9)
    assert cost.margin == pytest.approx(1)
    numbers, masks = np.array([2.0, 9.0]), np.array([4.0, 80.0])
    expected = [network.seconds(2, 4), network.seconds(9, 80)]
    np.testing.assert_allclose(cost.seconds(numbers, masks), expected, rtol=1e-9)


def test_margin_is_what_nine_of_ten_calls_keep() -> None:
    """Of three measured rounds one is half as slow again; calls to warm up do not count."""
    network = Network(5.0, 0.25, 1.0, slow=(9.0, 9.0, 1.0, 9.0, 1.5, 9.0, 1.0))
    cost = measure(network, CollectionCAM(), network.clock)
    assert (cost.fixed, cost.per_mask) == pytest.approx((5.0, 1.0))
    assert cost.margin == pytest.approx(1.5)
    one = np.ones(1)
    np.testing.assert_allclose(cost.seconds(one, one), [1.5 * network.seconds(1, 1)])


class EarlyNetwork(Network):
    """As a GPU does, it begins with as many masks as the call before it had."""

    before = 0

    def __call__(self, options: CollectionCAM) -> int:
        masks = super().__call__(options)
        self.clock.time += self.rates[2] * max(self.before - masks, 0)
        self.before = masks
        return masks


def test_masks_of_the_call_before_are_no_part_of_the_cost() -> None:
    network = EarlyNetwork(5.0, 0.25, 1.0)
    cost = measure(network, CollectionCAM(), network.clock)
    assert (cost.fixed, cost.per_number, cost.per_mask) == pytest.approx((5.0, 0.25, 1.0))
    assert cost.margin == pytest.approx(1)


@pytest.mark.parametrize(("k_min", "k_max"), [(1, 1), (6, 6)])
def test_one_number_of_collections(k_min: int, k_max: int) -> None:
    """There is nothing to choose, but the time is still known."""
    network = Network(5.0, 0.25, 1.0)
    options = CollectionCAM(k_min=k_min, k_max=k_max)
    cost = measure(network, options, network.clock)
    masks = sum(min(k_max, channels) - 1 for channels in CHANNELS.values())
    got = cost.seconds(np.ones(1), np.array([float(masks)]))
    np.testing.assert_allclose(got, [network.seconds(1, masks)], rtol=1e-9)


def costs_of(network: Network) -> tuple[Costs, list[tuple[int, int]]]:
    """Costs whose calls take as long however many images there are; and what was rehearsed."""
    rehearsed = []

    def rehearse(images: int, pairs: int) -> Run:
        rehearsed.append((images, pairs))
        return network

    return Costs(CHANNELS, rehearse, network.clock), rehearsed


def test_prediction_is_of_the_most_masks_that_there_can_be() -> None:
    """A layer of four channels has no more collections than those; pairs have masks each."""
    network = Network(5.0, 0.25, 1.0)
    costs, rehearsed = costs_of(network)
    options = CollectionCAM(k_min=3, k_max=6)
    predicted = costs.predict([(2, 3)], options)
    masks = [3 + 3 + 3, 4 + 4 + 4, 4 + 5 + 5, 4 + 6 + 6]
    expected = [network.seconds(n + 1, 3 * count) for n, count in enumerate(masks)]
    np.testing.assert_allclose(predicted, expected)
    assert rehearsed == [(2, 3)]
    several = costs.predict([(2, 3), (2, 3), (1, 1)], options)
    expected = [
        2 * network.seconds(n + 1, 3 * count) + network.seconds(n + 1, count)
        for n, count in enumerate(masks)
    ]
    np.testing.assert_allclose(several, expected)
    assert rehearsed == [(2, 3), (1, 1)]


def test_only_options_that_change_the_work_are_measured_anew() -> None:
    network = Network(5.0, 0.25, 1.0)
    costs, rehearsed = costs_of(network)
    known = costs.of(1, 1, CollectionCAM())
    for options in (
        CollectionCAM(theta=0.3),
        CollectionCAM(score="probability", standardise=True),
    ):
        assert costs.of(1, 1, options) is known
    assert len(rehearsed) == 1
    for options in (
        CollectionCAM(k_max=5),
        CollectionCAM(k_min=3),
        CollectionCAM(layers=("high",)),
        CollectionCAM(gate=0.1),
    ):
        costs.of(1, 1, options)
    costs.of(2, 2, CollectionCAM())
    assert len(rehearsed) == 6
    (one,) = costs.predict([(1, 1)], CollectionCAM(k_min=5, k_max=5, layers=("high",)))
    assert one == pytest.approx(network.seconds(1, 5), rel=0.5)


def test_the_largest_that_fits_is_chosen() -> None:
    """For every budget, up to the microsecond; what was spent before is taken off."""
    network = Network(0.005, 0.00025, 0.001)
    costs, _ = costs_of(network)
    options = CollectionCAM(theta=0.3)
    takes = {
        k: 1000 * network.seconds(k - 1, sum(min(k, c) for c in CHANNELS.values()))
        for k in range(2, 11)
    }
    for k, ms in takes.items():
        for spent in (0.0, 0.002):
            budget_ms = ms + 1000 * spent + 0.001
            chosen, told = costs.within(budget_ms, spent, [(1, 1)], options)
            assert chosen == CollectionCAM(theta=0.3, k_max=k)
            assert (told.ms, told.k_max, told.k_max_asked) == (budget_ms, k, 10)
            assert told.predicted_ms == pytest.approx(ms + 1000 * spent)
    chosen, _ = costs.within(1e9, 0.0, [(1, 1)], options)
    assert chosen == options
    with pytest.raises(
        OptionError,
        match=r"budget_ms is 11.2; with k_max 2, the least, this call is expected to take 11.3 ms",
    ):
        costs.within(11.2, 0.0, [(1, 1)], options)


@pytest.mark.parametrize("budget_ms", [0, -1.0, math.nan, math.inf])
def test_no_budgets(budget_ms: float) -> None:
    with pytest.raises(OptionError, match=r"budget_ms is \S+; it must be above 0 and finite"):
        validate_budget(budget_ms, CollectionCAM())


def test_budgets_are_for_collection_cam() -> None:
    validate_budget(None, RISE())
    validate_budget(1, CollectionCAM())
    with pytest.raises(OptionError, match="kept by collection-cam alone; the method is rise"):
        validate_budget(5, RISE())

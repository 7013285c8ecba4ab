"""Sweeps over many cases, of which the default run takes a few that stand for the others."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def nightly_but(daily: Container[Any], cases: Iterable[Any]) -> list[Any]:
    """A parametrisation's cases, marked `nightly` unless they are among the daily ones."""
    return [
        case if case in daily else pytest.param(case, marks=pytest.mark.nightly) for case in cases
    ]


def by_pace(quick: Container[str], nightly: Container[str], cases: Iterable[str]) -> list[Any]:
    """A parametrisation's cases, marked `nightly`, or `slow` unless they are quick."""

    def marks(case: str) -> list[pytest.MarkDecorator]:
        if case in nightly:
            return [pytest.mark.nightly]
        return [] if case in quick else [pytest.mark.slow]

    return [pytest.param(case, marks=marks(case)) for case in cases]

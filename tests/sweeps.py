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

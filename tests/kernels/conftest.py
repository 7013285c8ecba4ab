"""Fixtures of the kernels' tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.kernels.declared import Machine


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine whose GPU is only named, and an empty cache folder."""
    from tests.kernels.declared import named_device

    return named_device(tmp_path / "cache" / "kernels", monkeypatch)

"""Bundles that workers share: whoever needs one exports it, and reports it where that fails."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from tests.bundles import EXPORTS, Bundles


def test_a_failure_is_left_to_the_test_that_needs_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another worker exports "awaited", this one tries "broken" once, and goes on."""

    def fail(folder: Path) -> None:
        attempts.append(folder.name)
        raise ValueError("the export fails")

    def finish(folder: Path) -> None:
        folder.mkdir()
        (tmp_path / "awaited").mkdir()

    attempts: list[str] = []
    monkeypatch.setitem(EXPORTS, "broken", fail)
    monkeypatch.setitem(EXPORTS, "first", Path.mkdir)
    monkeypatch.setitem(EXPORTS, "second", finish)
    shared = Bundles(tmp_path)
    shared.expect(["broken", "first", "second"])
    with (tmp_path / "awaited.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert shared.get("awaited") == tmp_path / "awaited"
    assert attempts == ["broken"]
    with pytest.raises(ValueError, match="the export fails"):
        shared.get("broken")
    assert attempts == ["broken", "broken"]

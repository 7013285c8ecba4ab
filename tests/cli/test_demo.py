"""`ccam-deploy demo`: what it says before it serves; tests/page opens the page itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ccam_deploy.page import server
from tests.command import failure


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Makes Gradio and its server look installed, or missing."""

    def pretend(there: bool) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)

    return pretend


def test_a_missing_extra_is_one_line(tiny_bundle: Path, installed: Callable[[bool], None]) -> None:
    installed(False)
    assert failure("demo", tiny_bundle) == "the page needs gradio: pip install 'ccam-deploy[demo]'"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "192.0.2.1", "--port", 0], "cannot listen at 192.0.2.1, port 0: Cannot assign"),
        (["--host", "no host", "--port", 0], "cannot listen at no host, port 0: "),
        (["--port", 65536], "65536 is not in the range 0<=x<=65535"),
        (["--colormap", "rainbow"], 'color map "rainbow" is unknown'),
    ],
)
def test_bad_options_are_one_line(
    tiny_bundle: Path, installed: Callable[[bool], None], words: list[Any], message: str
) -> None:
    installed(True)
    assert message in failure("demo", tiny_bundle, *words)


def test_no_bundle_is_one_line(tmp_path: Path, installed: Callable[[bool], None]) -> None:
    installed(True)
    line = failure("demo", tmp_path / "none", "--port", 0)
    assert line.endswith("none is not a bundle: there is no such folder")


def test_a_port_that_is_taken(tiny_bundle: Path, installed: Callable[[bool], None]) -> None:
    installed(True)
    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        line = failure("demo", tiny_bundle, "--port", port)
    assert line == (
        f"cannot listen at 127.0.0.1, port {port}: Address already in use; "
        "give another --host or --port"
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_addresses_that_only_this_machine_reaches(host: str) -> None:
    assert server.is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "", "127.0.0.1.example"])
def test_addresses_that_others_reach(host: str) -> None:
    assert not server.is_loopback(host)

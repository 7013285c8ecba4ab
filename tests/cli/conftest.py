"""Where commands run, and the models that they are given."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs and a file of weights. Do not change them: copy them."""
    import torch

    from ccam_deploy.export.program import trace_model
    from tests.networks import Detached, tiny

    folder = tmp_path_factory.mktemp("models")
    torch.export.save(trace_model(tiny(), (3, 32, 48)), folder / "net.pt2")
    torch.export.save(trace_model(Detached(), (3, 32, 48)), folder / "aside.pt2")
    torch.save(tiny().state_dict(), folder / "net.pt")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path

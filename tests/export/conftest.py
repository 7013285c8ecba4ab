"""Model files that several tests read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from ccam_deploy.export.program import trace_model
from tests.export.model_files import SIZE, ByImage
from tests.networks import tiny


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model files of every kind. Do not change them: copy them."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny()
    torch.save(model.state_dict(), folder / "weights.pt")
    torch.save(model.state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(model, folder / "pickled.pt")
    torch.export.save(trace_model(model, SIZE), folder / "program.pt2")
    jit: Any = torch.jit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jit.save(jit.trace(model, torch.zeros(2, *SIZE)), folder / "traced.pt")
        jit.save(jit.script(ByImage()), folder / "scripted.pt")
    return folder

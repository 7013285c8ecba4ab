"""TorchScript files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ccam_deploy.errors import SourceError, brief
from ccam_deploy.export.program import quiet


class ScriptedModel(nn.Module):
    """Hides a TorchScript module from torch.export, which then traces what it computes."""

    tracing_advice = (
        "the TorchScript code fixes the batch, or cannot be traced; save the original model with "
        "torch.export.save(torch.export.export(model, ...)) and pass that .pt2 file"
    )

    def __init__(self, script: torch.jit.ScriptModule) -> None:
        super().__init__()
        self._script = (script,)

    def forward(self, images: Tensor) -> Any:
        """Run the script without the optimiser, which would hide operators from the trace."""
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return self._script[0](images)


def read_script(path: Path) -> nn.Module:
    """Read a TorchScript file.

    Args:
        path: The file.

    Returns:
        A module that runs it on the CPU in float32.

    Raises:
        SourceError: The file cannot be read.
    """
    try:
        with quiet():
            script = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    except Exception as error:
        raise SourceError(f"{path} is not a readable TorchScript file: {brief(error)}") from error
    return ScriptedModel(script.float().eval())

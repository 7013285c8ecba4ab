"""TorchScript files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ccam_deploy.errors import SourceError, brief
from ccam_deploy.export.program import quiet
from ccam_deploy.export.script_interpreter import Scope


class ScriptedModel(Scope):
    """A TorchScript classifier, images [B, C, H, W] -> logits, as torch.export can trace it."""

    tracing_advice = (
        "the TorchScript code fixes the batch, or cannot be traced; save the original model with "
        "torch.export.save(torch.export.export(model, ...)) and pass that .pt2 file"
    )

    def forward(self, images: Tensor) -> Any:  # type: ignore[override]
        """Run the script's code."""
        return self.run_script("forward", images)


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

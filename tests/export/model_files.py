"""What tests of model files share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ccam_deploy.errors import SourceError
from ccam_deploy.export.architecture import Model

TINY = "tests.networks:tiny"
SIZE = (3, 32, 48)


class ByImage(nn.Module):
    """Goes through the batch in a loop, which a trace would unroll."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for i in range(x.size(0)):
            rows.append(self.conv(x[i : i + 1]).mean((2, 3)))
        return torch.cat(rows)


def same_weights(model: Model, other: nn.Module) -> bool:
    mine, theirs = model.state_dict, other.state_dict()
    values = mine() if callable(mine) else mine
    return list(values) == list(theirs) and all(torch.equal(values[n], theirs[n]) for n in theirs)


def refusal(action: Callable[[], object]) -> str:
    """The message of the SourceError that an action raises."""
    with pytest.raises(SourceError) as raised:
        action()
    assert "\n" not in str(raised.value)
    return str(raised.value)

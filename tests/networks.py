"""Networks with a place for the operator under test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A convolution, something else, a head."""

    def __init__(self, body: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.aside = nn.Conv2d(3, 6, 3, 2, 1)
        self.body = Body(body)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Body(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Detached(Net):
    """A convolution that the logits read, but whose gradient is cut off."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) + self.aside(x).detach().mean((2, 3))[:, :5]

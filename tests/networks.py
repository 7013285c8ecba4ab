"""Small networks, some with a place for the operator under test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import RECIPES


class TinyNet(nn.Module):
    """images [B, 3, H, W] -> logits [B, 5]; two resolutions, normalisation and dropout."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, 2, 1)
        self.norm1 = nn.BatchNorm2d(6)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 8, 3, 2, 1)
        self.relu2 = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.norm1(self.conv1(x)))
        x = self.relu2(self.conv2(x))
        return self.head(self.drop(x.mean((2, 3))))  # type: ignore[no-any-return]


def tiny(channels: int = 3) -> TinyNet:
    """A seeded TinyNet in evaluation mode, with normalisation statistics that matter."""
    torch.manual_seed(0)
    model = TinyNet(channels)
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                value.uniform_(0.5, 1.5)
    return model.eval()


def make_tiny(classes: int = 5, channels: int = 3) -> nn.Module:
    """A factory for `--arch` that takes arguments."""
    model = tiny(channels)
    model.head = nn.Linear(8, classes)
    return model


class Ended(nn.Module):
    """A TinyNet whose outputs go through something else at the end."""

    def __init__(self, end: Callable[[Tensor], Tensor], classes: int = 5) -> None:
        super().__init__()
        self.net = make_tiny(classes)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.net(x))


class Wide(nn.Module):
    """images [B, 3, 224, 224] -> logits [B, 5]; 2,048 channels of 7×7, as a ResNet-101 has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 8, 8)
        self.last = nn.Conv2d(16, 2048, 4, 4)
        self.head = nn.Linear(2048, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        features = torch.relu(self.last(torch.relu(self.stem(x))))
        return self.head(features.mean((2, 3)))  # type: ignore[no-any-return]


def digits_model() -> nn.Module:
    """The trained example classifier."""
    from ccam_deploy.export.recipe import read_recipe, recipe_model

    path = RECIPES / "digits.toml"
    return recipe_model(read_recipe(path), path.parent).eval()


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

"""The example classifier: a small residual network for digits in scenes, 96×96 pixels."""

from __future__ import annotations

from torch import Tensor, nn


class _Block(nn.Module):
    """Two 3×3 convolutions with a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return self.relu(y + self.shortcut(x))  # type: ignore[no-any-return]


class DigitsNet(nn.Module):
    """Map images [B, 3, 96, 96] to logits [B, 10] in four stages, from 48×48 to 6×6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.layer1 = _Block(16, 24, 1)
        self.layer2 = _Block(24, 40, 2)
        self.layer3 = _Block(40, 80, 2)
        self.layer4 = _Block(80, 128, 2)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            x: [B, 3, 96, 96] float32, images.

        Returns:
            [B, 10] float32.
        """
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.head(self.dropout(x.mean((2, 3))))  # type: ignore[no-any-return]

"""Small networks whose feature maps are tokens, windows, or have their channels last."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

PATCH, WIDTH, CLASSES = 8, 12, 5


class Attention(nn.Module):
    """Self-attention of tokens [B, T, C], with two heads."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        query, key, value = self.qkv(x).view(batch, count, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(attended.transpose(1, 2).reshape(batch, count, width))  # type: ignore[no-any-return]


class Mixing(nn.Module):
    """Mixes tokens [B, T, C] with fixed weights."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.linear = nn.Linear(count, count)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


class Block(nn.Module):
    """A transformer block of tokens [B, T, C]; a mixer's, where the number of tokens is given."""

    def __init__(self, width: int = WIDTH, count: int = 0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Mixing(count) if count else Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class LinearPatches(nn.Module):
    """Patches of images cut out by a change of shape, [B, WIDTH, h, w]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * PATCH * PATCH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
        x = self.linear(x.permute(0, 2, 4, 3, 5, 1).flatten(3))
        return x.permute(0, 3, 1, 2)


class TinyViT(nn.Module):
    """A vision transformer: class token, register tokens, or the mean of the patches.

    Args:
        pool: What the logits are read from.
        registers: How many tokens stand behind the class token.
        depth: The number of blocks.
        patches: The number of patches, where fixed weights take the place of attention.
        linear: Whether patches are cut out by a change of shape, and not by a convolution.
    """

    def __init__(
        self,
        pool: Literal["class", "mean"] = "class",
        registers: int = 0,
        depth: int = 3,
        patches: int = 0,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.left_out = registers + (pool == "class")
        self.patches = LinearPatches() if linear else nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.extra = nn.Parameter(torch.randn(1, self.left_out, WIDTH))
        count = patches + self.left_out if patches else 0
        self.blocks = nn.Sequential(*(Block(count=count) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.left_out:
            x = torch.cat([self.extra.expand(x.shape[0], -1, -1), x], 1)
        x = self.norm(self.blocks(x))
        read = x[:, 0] if self.pool == "class" else x[:, self.left_out :].mean(1)
        return self.head(read)  # type: ignore[no-any-return]


class WindowBlock(nn.Module):
    """Attention in shifted windows of a map [B, h, w, C]."""

    def __init__(self, width: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm, self.attention = nn.LayerNorm(width), Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, channels = x.shape
        side, shift = self.window, self.shift
        y = self.norm(x)
        if shift:
            y = torch.roll(y, (-shift, -shift), (1, 2))
        y = y.view(-1, height // side, side, width // side, side, channels)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, channels)
        y = self.attention(y).view(-1, height // side, width // side, side, side, channels)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)
        if shift:
            y = torch.roll(y, (shift, shift), (1, 2))
        x = x + y
        return x + self.mlp(x)  # type: ignore[no-any-return]


class Merge(nn.Module):
    """Four neighbours of a map [B, h, w, C] become one of twice the channels.

    Args:
        width: The number of channels.
        reshaped: Whether they are brought together by a change of shape, and not by slices.
    """

    def __init__(self, width: int, reshaped: bool) -> None:
        super().__init__()
        self.reshaped = reshaped
        self.reduce = nn.Linear(4 * width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        if self.reshaped:
            batch, height, width, channels = x.shape
            x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
            return self.reduce(x.permute(0, 1, 3, 4, 2, 5).flatten(3))  # type: ignore[no-any-return]
        parts = [x[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
        return self.reduce(torch.cat(parts, -1))  # type: ignore[no-any-return]


class TokenBlock(WindowBlock):
    """Works on tokens, and gives its sum in the shape of a map."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        batch, height, width, channels = x.shape
        x = x.reshape(batch, -1, channels)
        return (x + self.norm(x)).reshape(batch, height, width, channels)  # type: ignore[no-any-return]


class TinySwin(nn.Module):
    """Shifted windows at two resolutions, with channels last throughout.

    Args:
        reshaped: Whether patches are merged, and blocks end, by a change of shape.
    """

    def __init__(self, reshaped: bool = False) -> None:
        super().__init__()
        block = TokenBlock if reshaped else WindowBlock
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.stage1 = nn.Sequential(WindowBlock(8, 4, 0), block(8, 4, 2))
        self.merge = Merge(8, reshaped)
        self.stage2 = nn.Sequential(WindowBlock(16, 2, 0), block(16, 2, 1))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.patches(x).permute(0, 2, 3, 1))
        x = self.norm(self.stage2(self.merge(x)))
        return self.head(x.mean((1, 2)))  # type: ignore[no-any-return]


class InWindows(nn.Module):
    """Tokens that stay in their windows, [B, windows, tokens, C], from the patches to the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.Sequential(Mixed(), Mixed())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        batch, channels, height, width = x.shape
        x = x.view(batch, channels, height // 4, 4, width // 4, 4).permute(0, 2, 4, 3, 5, 1)
        x = self.blocks(x.reshape(batch, -1, 16, channels))
        return self.head(x.mean((1, 2)))  # type: ignore[no-any-return]


class Mixed(nn.Module):
    """Mixes the tokens of a window, then its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.channels = nn.Linear(16, 16), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(x.transpose(-1, -2)).transpose(-1, -2)
        return x + self.channels(x).tanh()  # type: ignore[no-any-return]


class Unrolled(nn.Module):
    """Tokens [B, 4, 16, C], neighbours on an axis of their own, the largest of which stay."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.stage1, self.stage2 = Residual(12), Residual(12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        batch, channels, height, width = x.shape
        x = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 3, 5, 2, 4, 1)
        x = self.stage1(x.reshape(batch, 4, -1, channels))
        x = self.stage2(x.amax(1))
        return self.head(x.mean(1))  # type: ignore[no-any-return]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()  # type: ignore[no-any-return]


class ChannelsLast(nn.Module):
    """Residual blocks of depthwise convolutions whose sums are [B, h, w, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block1 = nn.Conv2d(3, 6, 4, 4), LastBlock(6)
        self.down, self.block2 = nn.Conv2d(6, 8, 2, 2), LastBlock(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.stem(x).permute(0, 2, 3, 1))
        x = self.block2(self.down(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.head(x.mean((1, 2)))  # type: ignore[no-any-return]


class LastBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 3, 1, 1, groups=width)
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.spatial(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.linear(self.norm(y))  # type: ignore[no-any-return]


def seeded(kind: type[nn.Module], **settings: object) -> nn.Module:
    """A network with seeded parameters that are large enough to matter, in evaluation mode."""
    torch.manual_seed(0)
    network = kind(**settings)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return network.eval()

"""Gradients of pooling by windows, without backward operators and indices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ccam_deploy.export.graph_editing import aten


def max_pool2d_backward(
    grad: Tensor,
    source: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Differentiate max-pooling without its indices.

    The gradient goes to the first maximum of each window, row by row.

    Args:
        grad: [B, C, h, w], the gradient of the pooled values.
        source: [B, C, H, W], the input.
        kernel: Height and width of the window, or one number for both.
        stride: In rows and columns, or one number for both; empty for the kernel's size.
        padding: In rows and columns, or one number for both.
        dilation: In rows and columns, or one number for both.
        ceil_mode: Not used; the shape of `grad` has it.
        indices: Not used.

    Returns:
        The gradient of the input, [B, C, H, W] in the type of `grad`.
    """
    kernel, padding, dilation = _pair(kernel), _pair(padding), _pair(dilation)
    stride = _pair(stride) if stride else kernel
    out = [int(size) for size in grad.shape[2:]]
    size = [int(length) for length in source.shape[2:]]
    end = [
        (o - 1) * s + d * (k - 1) + 1 - p - length
        for o, s, d, k, p, length in zip(out, stride, dilation, kernel, padding, size, strict=True)
    ]
    border = [padding[1], max(end[1], 0), padding[0], max(end[0], 0)]
    padded = aten.constant_pad_nd(source, border, -math.inf) if any(border) else source
    values = [
        _window(padded, (row * dilation[0], column * dilation[1]), out, stride)
        for row in range(kernel[0])
        for column in range(kernel[1])
    ]
    # Not the pooled values of the forward pass: an engine that computes half precision in a wider
    # type may not have rounded those, and then none would be equal.
    highest = reduce(torch.maximum, values)
    hits = []
    free: Tensor | None = None
    for value in values:
        equal = value == highest
        hit = equal if free is None else equal & free
        free = ~equal if free is None else free & ~equal
        hits.append(torch.where(hit, grad, 0.0))
    gathered = _add_windows(hits, kernel, stride, dilation)
    top, left = padding
    gathered = gathered[:, :, top : top + size[0], left : left + size[1]]
    short = [length - int(side) for length, side in zip(size, gathered.shape[2:], strict=True)]
    return (
        aten.constant_pad_nd(gathered, [0, short[1], 0, short[0]], 0.0) if any(short) else gathered
    )


def _window(
    source: Tensor, start: Sequence[int], out: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """The values at one position of every pooling window: [B, C, *out]."""
    for axis in (0, 1):
        stop = start[axis] + (out[axis] - 1) * stride[axis] + 1
        source = aten.slice(source, axis + 2, start[axis], stop, stride[axis])
    return source


def _add_windows(
    parts: list[Tensor], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Add up the gradients of all window positions, each where its input was.

    parts: [B, C, h, w] for each position of the window, row by row.
    Returns [B, C, (h - 1) · stride + dilation · (kernel - 1) + 1, the same of w].
    """
    batch, channels, height, width = parts[0].shape
    stacked = torch.stack(parts, dim=2)
    if list(kernel) == list(stride) and list(dilation) == [1, 1]:
        tiles = stacked.reshape(batch, channels, kernel[0], kernel[1], height, width)
        return tiles.permute(0, 1, 4, 2, 5, 3).reshape(
            batch, channels, height * kernel[0], width * kernel[1]
        )
    positions = kernel[0] * kernel[1]
    place = torch.tensor([[float(i == j) for j in range(positions)] for i in range(positions)])
    weight = place.to(parts[0].dtype).reshape(positions, 1, *kernel).repeat(channels, 1, 1, 1)
    flat = stacked.reshape(batch, channels * positions, height, width)
    placed: Tensor = aten.convolution(
        flat, weight, None, stride, [0, 0], dilation, True, [0, 0], channels
    )
    return placed


def avg_pool2d_backward(
    grad: Tensor,
    source: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Differentiate average pooling.

    A transposed depthwise convolution spreads each window's gradient over its values.

    Args:
        grad: [B, C, h, w], the gradient of the averages.
        source: [B, C, H, W], the input.
        kernel: Height and width of the window, or one number for both.
        stride: In rows and columns, or one number for both; empty for the kernel's size.
        padding: In rows and columns, or one number for both.
        ceil_mode: Not used; the shape of `grad` has it.
        count_include_pad: Whether zeros of the padding count as values.
        divisor_override: What a window's sum was divided by; None for the number of its values.

    Returns:
        The gradient of the input, [B, C, H, W] in the type of `grad`.
    """
    kernel, padding = _pair(kernel), _pair(padding)
    stride = _pair(stride) if stride else kernel
    channels = int(source.shape[1])
    size = [int(length) for length in source.shape[2:]]
    out = [int(length) for length in grad.shape[2:]]
    divisor = _divisors(size, out, kernel, stride, padding, count_include_pad, divisor_override)
    share = grad / divisor.to(grad.dtype)
    full = [(o - 1) * s + k for o, s, k in zip(out, stride, kernel, strict=True)]
    weight = torch.ones(channels, 1, *kernel, dtype=grad.dtype)
    spread: Tensor = aten.convolution(
        share, weight, None, stride, [0, 0], [1, 1], True, [0, 0], channels
    )
    missing = [max(n + p - f, 0) for n, p, f in zip(size, padding, full, strict=True)]
    if any(missing):
        spread = aten.constant_pad_nd(spread, [0, missing[1], 0, missing[0]], 0.0)
    top, left = padding
    return spread[:, :, top : top + size[0], left : left + size[1]]


def _divisors(
    size: Sequence[int],
    out: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """How many values each window averages: [1, 1, *out], or [1] where it is the same for all."""
    if divisor_override is not None:
        return torch.full((1,), float(divisor_override))
    counts = []
    for axis in (0, 1):
        low = [i * stride[axis] - padding[axis] for i in range(out[axis])]
        bound = size[axis] + padding[axis]
        high = [min(start + kernel[axis], bound) for start in low]
        if not count_include_pad:
            low = [max(start, 0) for start in low]
            high = [min(stop, size[axis]) for stop in high]
        counts.append([float(stop - start) for start, stop in zip(low, high, strict=True)])
    rows, columns = torch.tensor(counts[0]), torch.tensor(counts[1])
    table = rows[:, None] * columns[None, :]
    whole = kernel[0] * kernel[1]
    if all(count == kernel[0] for count in counts[0]) and all(c == kernel[1] for c in counts[1]):
        return torch.full((1,), float(whole))
    return table[None, None]


def _pair(values: Sequence[int]) -> list[int]:
    return [int(values[0]), int(values[-1])]

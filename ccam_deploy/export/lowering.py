"""Decompositions that keep exported graphs within what inference engines can run.

Engines have no backward operators, and some reject indices of max-pooling and scattering writes.
Every operator here becomes convolutions, matrix products and element-wise arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._decomp import get_decompositions

from ccam_deploy.export.program import aten

_TO_THE_END = 2**62
Decomposition = Callable[..., object]

_FROM_TORCH = (
    aten.threshold_backward,
    aten.hardswish_backward,
    aten.hardsigmoid_backward,
    aten.hardtanh_backward,
    aten.silu_backward,
    aten.gelu_backward,
    aten.elu_backward,
    aten.leaky_relu_backward,
    aten.sigmoid_backward,
    aten.tanh_backward,
    aten.softplus_backward,
    aten.mish_backward,
    aten._prelu_kernel_backward,
    aten._softmax_backward_data,
    aten._log_softmax_backward_data,
    aten.native_layer_norm_backward,
    aten.native_group_norm_backward,
    aten._prelu_kernel,
    aten._unsafe_view,
)


def decompositions() -> dict[Any, Decomposition]:
    """Make the table for `make_fx`: PyTorch's entries, and this module's for engines.

    Returns:
        The decomposition of each ATen operator that engines cannot run.
    """
    table: dict[Any, Decomposition] = dict(get_decompositions(_FROM_TORCH))
    table.update(
        {
            aten.convolution_backward.default: convolution_backward,
            aten.max_pool2d_with_indices_backward.default: max_pool2d_backward,
            aten.avg_pool2d_backward.default: avg_pool2d_backward,
            aten._adaptive_avg_pool2d.default: adaptive_avg_pool2d,
            aten._adaptive_avg_pool2d_backward.default: adaptive_avg_pool2d_backward,
            aten.slice_backward.default: slice_backward,
            aten.select_backward.default: select_backward,
            aten.scatter_add.default: refuse_scattered_sum,
            aten.index_add.default: refuse_scattered_sum,
            aten.index_put.default: index_put,
            aten._unsafe_index_put.default: index_put,
        }
    )
    return table


def convolution_backward(
    grad: Tensor,
    source: Tensor,
    weight: Tensor,
    bias_sizes: object,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, None, None]:
    """Differentiate a convolution with respect to its input.

    The gradient is a plain convolution with flipped weights at stride 1, and a transposed
    convolution otherwise. The parameters are ATen's: `make_fx` passes them by position.

    Args:
        grad: [B, O, h, w], the gradient of the output.
        source: [B, I, H, W], the input.
        weight: [O, I/groups, kh, kw]; [I, O/groups, kh, kw] of a transposed convolution.
        bias_sizes: Not used.
        stride: In rows and columns.
        padding: In rows and columns, on either side.
        dilation: In rows and columns.
        transposed: Whether the convolution is a transposed one.
        output_padding: Not used; the shape of `grad` has it.
        groups: The number of groups of channels.
        output_mask: Whether the gradients of input, weight and bias are wanted.

    Returns:
        The gradient of the input, [B, I, H, W] in the type of `grad`, or None where it is not
        wanted; None for the weight and the bias, which are constants here.

    Raises:
        NotImplementedError: The convolution is not two-dimensional.
    """
    if not output_mask[0]:
        return None, None, None
    if weight.dim() != 4:
        raise NotImplementedError(f"the gradient of a {weight.dim() - 2}-D convolution")
    if transposed:
        backward = aten.convolution(
            grad, weight, None, stride, padding, dilation, False, [0, 0], groups
        )
        return backward, None, None
    kernel = weight.shape[2:]
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    margin = [r - p for r, p in zip(reach, padding, strict=True)]
    if all(s == 1 for s in stride) and all(m >= 0 for m in margin):
        flipped = _flip_and_transpose(weight, groups)
        backward = aten.convolution(
            grad, flipped, None, [1, 1], margin, dilation, False, [0, 0], groups
        )
        return backward, None, None
    missing = [
        int(size) - ((int(out) - 1) * s - 2 * p + r + 1)
        for size, out, s, p, r in zip(
            source.shape[2:], grad.shape[2:], stride, padding, reach, strict=True
        )
    ]
    backward = aten.convolution(
        grad, weight, None, stride, padding, dilation, True, missing, groups
    )
    return backward, None, None


def _flip_and_transpose(weight: Tensor, groups: int) -> Tensor:
    """Weights [O, I/groups, h, w] of a convolution to those of its gradient [I, O/groups, h, w]."""
    out, inner, height, width = weight.shape
    if height > 1 or width > 1:
        weight = weight.flip([2, 3])
    grouped = weight.reshape(groups, out // groups, inner, height, width).transpose(1, 2)
    return grouped.reshape(groups * inner, out // groups, height, width)


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


def adaptive_avg_pool2d(source: Tensor, output_size: Sequence[int]) -> Tensor:
    """Pool averages to a given size in two matrix products, whatever the ratio of the sizes.

    Args:
        source: [B, C, H, W].
        output_size: Height h and width w.

    Returns:
        The averages, [B, C, h, w] in the type of `source`.
    """
    size = [int(length) for length in source.shape[2:]]
    if list(output_size) == size:
        return source
    rows, columns = (
        _averaging_matrix(n, int(o)).to(source.dtype)
        for n, o in zip(size, output_size, strict=True)
    )
    return torch.matmul(torch.matmul(rows, source), columns.t())


def adaptive_avg_pool2d_backward(grad: Tensor, source: Tensor) -> Tensor:
    """Differentiate adaptive average pooling, by the transposed matrix products.

    Args:
        grad: [B, C, h, w], the gradient of the averages.
        source: [B, C, H, W], the input.

    Returns:
        The gradient of the input, [B, C, H, W] in the type of `grad`.
    """
    size = [int(length) for length in source.shape[2:]]
    out = [int(length) for length in grad.shape[2:]]
    if size == out:
        return grad
    rows, columns = (_averaging_matrix(n, o).to(grad.dtype) for n, o in zip(size, out, strict=True))
    return torch.matmul(torch.matmul(rows.t(), grad), columns)


def _averaging_matrix(size: int, out: int) -> Tensor:
    """The float32 matrix [out, size] that averages `size` values into `out` of them."""
    rows = []
    for index in range(out):
        start, stop = index * size // out, -(-(index + 1) * size // out)
        share = 1.0 / (stop - start)
        rows.append([share if start <= column < stop else 0.0 for column in range(size)])
    return torch.tensor(rows)


def slice_backward(
    grad: Tensor, input_sizes: Sequence[int], dim: int, start: int, end: int, step: int
) -> Tensor:
    """Differentiate a slice: its gradient between zeros.

    Args:
        grad: The gradient of the slice.
        input_sizes: The shape of the tensor that was sliced.
        dim: The sliced dimension.
        start: The first index; negative ones count from the end.
        end: The index after the last.
        step: The distance of the indices.

    Returns:
        The gradient of the whole tensor, of shape `input_sizes` in the type of `grad`.

    Raises:
        NotImplementedError: The step is not 1.
    """
    if start == 0 and end >= _TO_THE_END and step == 1:
        return grad
    length = int(input_sizes[dim])
    first = min(max(start + length if start < 0 else start, 0), length)
    if step != 1:
        raise NotImplementedError("the gradient of a slice with a step")
    return _pad_with_zeros(grad, dim, first, length - first - int(grad.shape[dim]))


def select_backward(grad: Tensor, input_sizes: Sequence[int], dim: int, index: int) -> Tensor:
    """Differentiate the choice of one index: its gradient between zeros.

    Args:
        grad: The gradient of what was taken, without the dimension.
        input_sizes: The shape of the tensor that it was taken from.
        dim: The dimension of the index.
        index: The index; negative ones count from the end.

    Returns:
        The gradient of the whole tensor, of shape `input_sizes` in the type of `grad`.
    """
    length = int(input_sizes[dim])
    first = index % length
    return _pad_with_zeros(grad.unsqueeze(dim), dim, first, length - first - 1)


def refuse_scattered_sum(*_: object) -> NoReturn:
    """Refuse to add to scattered places, which engines cannot run.

    Raises:
        NotImplementedError: Always.
    """
    raise NotImplementedError("it adds to scattered places, which engines reject")


def index_put(
    source: Tensor, indices: Sequence[Tensor], values: Tensor, accumulate: bool = False
) -> object:
    """Leave a write to some indices as it is, and refuse to add to them.

    Args:
        source: The tensor that is written to.
        indices: A tensor of indices for each leading dimension.
        values: What is written.
        accumulate: Whether the values are added to those that are there.

    Returns:
        NotImplemented, by which `make_fx` keeps the operator.

    Raises:
        NotImplementedError: The values are to be added.
    """
    if accumulate:
        refuse_scattered_sum()
    return NotImplemented


def _pad_with_zeros(grad: Tensor, dim: int, before: int, after: int) -> Tensor:
    if not before and not after:
        return grad
    border = [0, 0] * (grad.dim() - 1 - dim % grad.dim()) + [before, after]
    padded: Tensor = aten.constant_pad_nd(grad, border, 0.0)
    return padded


def _pair(values: Sequence[int]) -> list[int]:
    return [int(values[0]), int(values[-1])]

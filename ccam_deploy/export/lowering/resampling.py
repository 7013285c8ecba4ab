"""Adaptive pooling and its gradient as matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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

"""Gradients of slices and of chosen indices, without writes to scattered places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

from ccam_deploy.export.graph_editing import TO_THE_END, aten


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
    """
    if start == 0 and end >= TO_THE_END and step == 1:
        return grad
    length = int(input_sizes[dim])
    first = min(max(start + length if start < 0 else start, 0), length)
    if step != 1:
        grad = _apart(grad, dim % grad.dim(), step, length - first)
    return _pad_with_zeros(grad, dim, first, length - first - int(grad.shape[dim]))


def _apart(grad: Tensor, dim: int, step: int, room: int) -> Tensor:
    """Values of one axis `step` apart with zeros between, at most `room` of them altogether."""
    count = int(grad.shape[dim])
    border = [0, 0] * (grad.dim() - 1 - dim) + [0, step - 1]
    padded = aten.constant_pad_nd(grad.unsqueeze(dim + 1), border, 0.0)
    shape = [*grad.shape[:dim], count * step, *grad.shape[dim + 1 :]]
    spread: Tensor = padded.reshape(shape)
    return spread.narrow(dim, 0, room) if count * step > room else spread


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

"""Gradients of convolutions as convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ccam_deploy.export.graph_editing import aten


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
        raise NotImplementedError(f"a {weight.dim() - 2}-D convolution has none")
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

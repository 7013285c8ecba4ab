"""ONNX operators that move a window over images: convolutions and pooling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ccam_deploy.export.from_onnx.call import Call, Rule

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
_MAX_POOLS: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOLS: dict[int, Callable[..., Tensor]] = {
    1: F.avg_pool1d,
    2: F.avg_pool2d,
    3: F.avg_pool3d,
}


def _convolution(call: Call) -> Tensor:
    value, weight, bias = call.tensor(0), call.tensor(1), call.optional_tensor(2)
    window = _Window(call, value, weight.shape[2:])
    if call.kind == "Conv":
        run = _CONVOLUTIONS[window.rank]
        padded, padding = window.padded(value, 0.0)
        return run(
            padded, weight, bias, window.strides, padding, window.dilations, call.get("group", 1)
        )
    if window.begin != window.end or call.get("output_shape"):
        raise NotImplementedError("its padding differs between the sides")
    return _TRANSPOSED[window.rank](
        value,
        weight,
        bias,
        window.strides,
        window.begin,
        call.get("output_padding", [0] * window.rank),
        call.get("group", 1),
        window.dilations,
    )


class _Window:
    """Kernel, strides, dilations and padding of a convolution or pool, one number an axis."""

    def __init__(self, call: Call, value: Tensor, kernel: Sequence[int]) -> None:
        self.kernel = list(map(int, kernel))
        self.rank = rank = len(self.kernel)
        self.strides = list(call.get("strides") or [1] * rank)
        self.dilations = list(call.get("dilations") or [1] * rank)
        pads = list(call.get("pads") or [0] * 2 * rank)
        auto = call.get("auto_pad", "NOTSET")
        if auto.startswith("SAME"):
            pads = self._same(value, upper=auto == "SAME_UPPER")
        self.begin, self.end = pads[:rank], pads[rank:]

    def padded(
        self, value: Tensor, filling: float, halves: bool = False
    ) -> tuple[Tensor, list[int]]:
        """The value, and the padding that is left to the operator: that of both sides alike.

        halves: The operator takes no padding of more than half of the kernel.
        """
        fits = not halves or all(
            2 * pad <= size for pad, size in zip(self.begin, self.kernel, strict=True)
        )
        if self.begin == self.end and fits:
            return value, self.begin
        return F.pad(value, self.amounts(), value=filling), [0] * self.rank

    def begun(self, result: Tensor, value: Tensor) -> Tensor:
        """A pool's result without the windows that begin in the padding at the end.

        `ceil_mode` makes them where the padding is part of what PyTorch's pool takes.

        Args:
            result: What the pool gives for the padded value.
            value: The value before its padding.
        """
        for axis, (stride, begin) in enumerate(zip(self.strides, self.begin, strict=True), 2):
            count = -(-(int(value.shape[axis]) + begin) // stride)
            if int(result.shape[axis]) > count:
                result = result.narrow(axis, 0, count)
        return result

    def amounts(self) -> list[int]:
        """The padding as F.pad takes it, of the last axis first."""
        pairs = list(zip(self.begin, self.end, strict=True))
        return [pad for pair in reversed(pairs) for pad in pair]

    def _same(self, value: Tensor, upper: bool) -> list[int]:
        totals = [
            max((-(-int(size) // stride) - 1) * stride + (kernel - 1) * dilation + 1 - int(size), 0)
            for size, stride, kernel, dilation in zip(
                value.shape[2:], self.strides, self.kernel, self.dilations, strict=True
            )
        ]
        less, more = [total // 2 for total in totals], [-(-total // 2) for total in totals]
        return [*less, *more] if upper else [*more, *less]


def _max_pool(call: Call) -> Tensor:
    value = call.tensor(0)
    window = _Window(call, value, call.get("kernel_shape"))
    padded, padding = window.padded(value, -math.inf, halves=True)
    largest = _MAX_POOLS[window.rank](
        padded,
        window.kernel,
        window.strides,
        padding,
        window.dilations,
        bool(call.get("ceil_mode")),
    )
    return window.begun(largest, value)


def _average_pool(call: Call) -> Tensor:
    value = call.tensor(0)
    window = _Window(call, value, call.get("kernel_shape"))
    if any(dilation != 1 for dilation in window.dilations):
        raise NotImplementedError("it averages over a dilated window")
    pool, ceil = _AVERAGE_POOLS[window.rank], bool(call.get("ceil_mode"))
    counted = bool(call.get("count_include_pad"))
    padded, padding = window.padded(value, 0.0, halves=True)
    if counted or padded is value:
        means = pool(padded, window.kernel, window.strides, padding, ceil, counted)
        return window.begun(means, value)
    sums = pool(padded, window.kernel, window.strides, 0, ceil)
    ones = torch.ones((1, 1, *map(int, value.shape[2:])), dtype=value.dtype)
    shares = pool(F.pad(ones, window.amounts()), window.kernel, window.strides, 0, ceil)
    return window.begun(sums, value) / window.begun(shares, value)


def _global_pool(call: Call) -> Tensor:
    value = call.tensor(0)
    axes = list(range(2, value.dim()))
    return value.mean(axes, True) if call.kind == "GlobalAveragePool" else value.amax(axes, True)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("Conv", "ConvTranspose"), _convolution),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _global_pool),
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
}
"""What each operator computes."""

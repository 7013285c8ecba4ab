"""Operators of a traced classifier in a form whose gradient engines can run.

What adds to scattered places backwards, such as upsampling, is a matrix product or a convolution
here, whose gradient is one too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ccam_deploy.errors import LoweringError
from ccam_deploy.export.graph_editing import TO_THE_END, Writer, aten, same_shape

Rule = Callable[..., fx.Node | None]


def rewrite_operators(module: fx.GraphModule) -> None:
    """Replace operators whose gradient engines cannot run, in place.

    Args:
        module: The classifier's graph, whose nodes have fake tensors.
    """
    _rewrite(module, _RULES)


def rewrite_copies(module: fx.GraphModule) -> None:
    """Replace what is written over a tensor, for PyTorch has no gradient of that, in place.

    Args:
        module: The classifier's graph, whose nodes have fake tensors.
    """
    _rewrite(module, {aten.copy.default: _copy})


def _rewrite(module: fx.GraphModule, rules: Mapping[Any, Rule]) -> None:
    for node in list(module.graph.nodes):
        rule = rules.get(node.target)
        if rule is None:
            continue
        with module.graph.inserting_before(node):
            new = rule(Writer(module, node), *node.args, **node.kwargs)
        if new is not None:
            new.meta["original_name"] = node.meta.get("original_name", node.name)
            node.replace_all_uses_with(new)
            module.graph.erase_node(node)


def _upsample(target: Any, axes: int, options: int) -> Rule:
    """Upsampling of the last axes as matrix products.

    `options` arguments stand between the size and the scales.
    """

    def rule(write: Writer, source: fx.Node, *args: Any) -> fx.Node:
        output_size, *between = args[: 1 + options]
        scales: Any = args[1 + options :] or [None]
        if isinstance(scales[0], Sequence):
            (scales,) = scales
        scales = [*scales, None][:axes]
        size = [int(length) for length in source.meta["val"].shape[-axes:]]
        out = [int(n * float(s or 1)) for n, s in zip(size, scales, strict=True)]
        if output_size is not None:
            out = [int(length) for length in output_size]
        matrices = [
            _resampling_matrix(target, axes, n, o, (*between, scale))
            for n, o, scale in zip(size, out, scales, strict=True)
        ]
        result = source
        if axes == 2 and not _is_identity(matrices[0]):
            # Turned, for a matrix on the left would be expanded over batch and channels.
            rows = write.constant(matrices[0].t().contiguous(), "upsampled_rows")
            turned = write.call(aten.transpose.int, result, -1, -2)
            product = write.call(aten.matmul.default, turned, rows)
            result = write.call(aten.transpose.int, product, -1, -2)
        if not _is_identity(matrices[-1]):
            columns = write.constant(matrices[-1].t().contiguous(), "upsampled_columns")
            result = write.call(aten.matmul.default, result, columns)
        return result if result is not source else write.call(aten.alias.default, source)

    return rule


def _resampling_matrix(
    target: Any, axes: int, size: int, out: int, options: Sequence[Any]
) -> Tensor:
    """The float32 matrix [out, size] of what an upsampling operator does to one axis.

    target: an overload that takes sizes and one scale for each axis.
    options: its arguments between the sizes and the scales, and the scale of this axis.
    """
    with torch.no_grad():
        if axes == 1:
            value = target(torch.eye(size)[None], [out], *options)
            return value[0].t().contiguous()  # type: ignore[no-any-return]
        # Of a picture that is one pixel wide, PyTorch 2.13 reduces the wrong axis, antialiased.
        units = torch.eye(size)[None, :, :, None].repeat(1, 1, 1, 2)
        value = target(units, [out, 2], *options, None)
        return value[0, :, :, 0].t().contiguous()  # type: ignore[no-any-return]


def _is_identity(matrix: Tensor) -> bool:
    return matrix.shape[0] == matrix.shape[1] and torch.equal(matrix, torch.eye(len(matrix)))


def _conv1d(
    write: Writer,
    source: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] | str = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> fx.Node:
    """A 1-D convolution as a 2-D one of a single row."""
    if isinstance(padding, str):
        reach = int(dilation[0]) * (int(weight.meta["val"].shape[2]) - 1)
        if padding == "same" and reach % 2:
            source = write.call(aten.constant_pad_nd.default, source, [0, 1])
        padding = [reach // 2 if padding == "same" else 0]
    image = write.call(aten.unsqueeze.default, source, 2)
    kernel = write.call(aten.unsqueeze.default, weight, 2)
    sides = [1, *stride], [0, *padding], [1, *dilation]
    output = write.call(
        aten.convolution.default, image, kernel, bias, *sides, False, [0, 0], groups
    )
    return write.call(aten.squeeze.dim, output, 2)


def _convolution(
    write: Writer,
    source: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> fx.Node | None:
    if weight.meta["val"].dim() != 3 or transposed:
        return None
    return _conv1d(write, source, weight, bias, stride, padding, dilation, groups)


def _conv3d(
    write: Writer,
    source: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> fx.Node | None:
    """A 3-D convolution that mixes nothing along one axis, as a 2-D one of that axis's places."""
    kernel = weight.meta["val"].shape[2:]
    sides = list(zip(kernel, stride, padding, strict=True))
    if (1, 1, 0) not in sides:
        return None
    alone = sides.index((1, 1, 0))
    plane = [axis for axis in range(3) if axis != alone]
    shape = source.meta["val"].shape
    turned = write.call(aten.permute.default, source, [0, alone + 2, 1, *(a + 2 for a in plane)])
    size = [int(n) for n in turned.meta["val"].shape[2:]]
    images = write.call(aten.reshape.default, turned, [-1, *size])
    flat = write.call(aten.squeeze.dim, weight, alone + 2)
    options = ([values[axis] for axis in plane] for values in (stride, padding, dilation))
    output = write.call(
        aten.convolution.default, images, flat, bias, *options, False, [0, 0], groups
    )
    size = [int(n) for n in output.meta["val"].shape[1:]]
    parted = write.call(aten.reshape.default, output, [-1, int(shape[alone + 2]), *size])
    order = [0, 2, 3, 4]
    order.insert(alone + 2, 1)
    return write.call(aten.permute.default, parted, order)


def _im2col(
    write: Writer,
    source: fx.Node,
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> fx.Node:
    """Windows [B, C·kh·kw, windows] of [B, C, H, W] by a convolution that copies."""
    channels = int(source.meta["val"].shape[1])
    weight = write.constant(_copies(channels, kernel), "window")
    windows = write.call(
        aten.convolution.default,
        *(source, weight, None, [*stride], [*padding], [*dilation], False, [0, 0], channels),
    )
    return write.call(aten.flatten.using_ints, windows, 2)


def _col2im(
    write: Writer,
    source: fx.Node,
    size: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> fx.Node:
    """Sums [B, C, H, W] of windows [B, C·kh·kw, windows] by a transposed convolution."""
    width = int(source.meta["val"].shape[1])
    channels = width // (int(kernel[0]) * int(kernel[1]))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padded = [int(n) + 2 * p for n, p in zip(size, padding, strict=True)]
    places = [(n - r) // s + 1 for n, r, s in zip(padded, reach, stride, strict=True)]
    rest = [n - ((o - 1) * s + r) for n, o, s, r in zip(padded, places, stride, reach, strict=True)]
    weight = write.constant(_copies(channels, kernel), "window")
    windows = write.call(aten.reshape.default, source, [-1, width, *places])
    return write.call(
        aten.convolution.default,
        *(windows, weight, None, [*stride], [*padding], [*dilation], True, rest, channels),
    )


def _copies(channels: int, kernel: Sequence[int]) -> Tensor:
    """Weights [C·kh·kw, 1, kh, kw] of a convolution that copies each place of a window."""
    places = int(kernel[0]) * int(kernel[1])
    return torch.eye(places).reshape(places, 1, *map(int, kernel)).repeat(channels, 1, 1, 1)


def _unfold(write: Writer, source: fx.Node, dimension: int, size: int, step: int) -> fx.Node:
    """Windows of one axis, as a new last axis, by slices."""
    value = source.meta["val"]
    axis = dimension % value.dim()
    starts = range(0, int(value.shape[axis]) - size + 1, step)
    slices = [write.call(aten.slice.Tensor, source, axis, n, n + size) for n in starts]
    windows = write.call(aten.stack.default, slices, axis)
    order = [n for n in range(value.dim() + 1) if n != axis + 1]
    return write.call(aten.permute.default, windows, [*order, axis + 1])


def _avg_pool2d(
    write: Writer,
    source: fx.Node,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> fx.Node | None:
    """Sums by a divisor of the network's own, which ONNX does not have, as means by a factor."""
    if divisor is None:
        return None
    if ceil_mode:
        raise LoweringError("avg_pool2d with a divisor and ceil_mode has no form in ONNX")
    height, width = (*kernel, *kernel)[:2]
    mean = write.call(
        aten.avg_pool2d.default, source, kernel, stride or kernel, padding, False, True
    )
    return write.call(aten.mul.Tensor, mean, height * width / divisor)


def _adaptive_max_pool2d(
    write: Writer, source: fx.Node, output_size: Sequence[int]
) -> fx.Node | None:
    """Adaptive max pooling as plain one; of rows and then of columns where windows overlap."""
    pool = aten.max_pool2d_with_indices.default
    size = [int(length) for length in source.meta["val"].shape[-2:]]
    out = [int(length) for length in output_size]
    if not any(length % count for length, count in zip(size, out, strict=True)):
        kernel = [length // count for length, count in zip(size, out, strict=True)]
        return write.call(pool, source, kernel, kernel)
    if write.is_read(1):
        return None
    for axis, length, count in zip((-2, -1), size, out, strict=True):
        parts = []
        for n in range(count):
            start, end = n * length // count, -(-(n + 1) * length // count)
            window = write.call(aten.slice.Tensor, source, axis, start, end)
            kernel = [end - start, 1] if axis == -2 else [1, end - start]
            parts.append(write.call(operator.getitem, write.call(pool, window, kernel), 0))
        source = write.call(aten.cat.default, parts, axis)
    # Pooling of single places changes nothing, and has two outputs as what it stands for.
    return write.call(pool, source, [1, 1])


def _pad(
    write: Writer, source: fx.Node, border: Sequence[int], mode: str = "constant", *_: Any
) -> fx.Node | None:
    """A border of the values inside it, by slices; one of a number is left as it is."""
    if mode == "constant":
        return None
    for place in range(0, len(border), 2):
        axis = source.meta["val"].dim() - 1 - place // 2
        length = int(source.meta["val"].shape[axis])
        before, after = int(border[place]), int(border[place + 1])
        parts = [source]
        if before:
            parts.insert(0, _border(write, source, mode, axis, (length, before, False)))
        if after:
            parts.append(_border(write, source, mode, axis, (length, after, True)))
        if len(parts) > 1:
            source = write.call(aten.cat.default, parts, axis)
    return source


def _border(
    write: Writer, source: fx.Node, mode: str, axis: int, side: tuple[int, int, bool]
) -> fx.Node:
    """One side's border; `side`: the axis's length, the border's width, whether it is the end."""
    length, width, end = side
    if mode == "replicate":
        first = length - 1 if end else 0
        edge = write.call(aten.slice.Tensor, source, axis, first, first + 1)
        return write.call(aten.cat.default, [edge] * width, axis) if width > 1 else edge
    if mode == "circular":
        first = 0 if end else length - width
        return write.call(aten.slice.Tensor, source, axis, first, first + width)
    first = length - 1 - width if end else 1
    inner = write.call(aten.slice.Tensor, source, axis, first, first + width)
    return write.call(aten.flip.default, inner, [axis]) if width > 1 else inner


def _copy(write: Writer, target: fx.Node, source: fx.Node, *_: Any) -> fx.Node | None:
    """What is written over all of a tensor."""
    value, place = source.meta["val"], target.meta["val"]
    if value.dtype != place.dtype or value.dim() != place.dim():
        return None
    if same_shape(value.shape, place.shape):
        return write.call(aten.alias.default, source)
    if isinstance(place.shape[0], torch.SymInt) and not isinstance(value.shape[0], torch.SymInt):
        return None
    sizes = [-1 if isinstance(size, torch.SymInt) else int(size) for size in place.shape]
    return write.call(aten.expand.default, source, sizes)


def _slice_scatter(
    write: Writer,
    source: fx.Node,
    values: fx.Node,
    axis: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> fx.Node | None:
    """A tensor with other values in the place of a slice, joined of what lies around it."""
    length = source.meta["val"].shape[axis]
    if step == 1 and not start and (end is None or end >= TO_THE_END):
        return write.call(aten.alias.default, values)
    if step != 1 or isinstance(length, torch.SymInt):
        return None
    first, last, _ = slice(start, end).indices(int(length))
    parts = [values]
    if first:
        parts.insert(0, write.call(aten.slice.Tensor, source, axis, 0, first))
    if last < length:
        parts.append(write.call(aten.slice.Tensor, source, axis, last, int(length)))
    return write.call(aten.cat.default, parts, axis)


def _select_scatter(
    write: Writer, source: fx.Node, values: fx.Node, axis: int, index: int
) -> fx.Node | None:
    length = source.meta["val"].shape[axis]
    if isinstance(length, torch.SymInt):
        return None
    first = index % int(length)
    one = write.call(aten.unsqueeze.default, values, axis % source.meta["val"].dim())
    return _slice_scatter(write, source, one, axis, first, first + 1)


def _attention(
    write: Writer,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    mask: fx.Node | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> fx.Node | None:
    """Attention by matrix products: the conversion of the whole would compute with sizes."""
    if options.get("enable_gqa"):
        return None
    shape = query.meta["val"].shape
    root = math.sqrt(options.get("scale") or 1 / math.sqrt(int(shape[-1])))
    queries = write.call(aten.mul.Scalar, query, root)
    keys = write.call(aten.mul.Scalar, write.call(aten.transpose.int, key, -2, -1), root)
    scores = write.call(aten.matmul.default, queries, keys)
    if is_causal:
        sides = int(shape[-2]), int(key.meta["val"].shape[-2])
        later = torch.full(sides, -math.inf).triu(1)
        scores = write.call(aten.add.Tensor, scores, write.constant(later, "later"))
    elif mask is not None and mask.meta["val"].dtype == torch.bool:
        hidden = write.call(aten.logical_not.default, mask)
        scores = write.call(aten.masked_fill.Scalar, scores, hidden, -math.inf)
    elif mask is not None:
        scores = write.call(aten.add.Tensor, scores, mask)
    return write.call(aten.matmul.default, write.call(aten.softmax.int, scores, -1), value)


_RULES: dict[Any, Rule] = {
    aten.conv1d.default: _conv1d,
    aten.conv1d.padding: _conv1d,
    aten.conv3d.default: _conv3d,
    aten.convolution.default: _convolution,
    aten.im2col.default: _im2col,
    aten.col2im.default: _col2im,
    aten.unfold.default: _unfold,
    aten.adaptive_max_pool2d.default: _adaptive_max_pool2d,
    aten.avg_pool2d.default: _avg_pool2d,
    aten.pad.default: _pad,
    aten.reflection_pad2d.default: lambda *args: _pad(*args, "reflect"),
    aten.replication_pad2d.default: lambda *args: _pad(*args, "replicate"),
    aten.scaled_dot_product_attention.default: _attention,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
}
for _name, _axes, _options in (
    ("upsample_nearest1d", 1, 0),
    ("upsample_linear1d", 1, 1),
    ("upsample_nearest2d", 2, 0),
    ("_upsample_nearest_exact2d", 2, 0),
    ("upsample_bilinear2d", 2, 1),
    ("upsample_bicubic2d", 2, 1),
    ("_upsample_bilinear2d_aa", 2, 1),
    ("_upsample_bicubic2d_aa", 2, 1),
):
    _overloads = getattr(aten, _name)
    for _overload in (_overloads.default, _overloads.vec):
        _RULES[_overload] = _upsample(_overloads.default, _axes, _options)

"""ONNX operators that compute with sizes or move values: shapes, indices, padding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor

from ccam_deploy.export.from_onnx.call import (
    Call,
    Result,
    Rule,
    Value,
    as_array,
    as_size,
    as_tensor,
    is_symbolic,
    size_at,
    without_batch,
)

_LARGEST = 2**28
"""How many values a constant may have."""
_FLOATS = (1, 10, 11, 16)
"""ONNX's numbers of float32, float16, float64 and bfloat16, all of which become float32."""
_TYPES = {2: np.uint8, 3: np.int8, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_}
_PADDINGS = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def _shape(call: Call) -> Value:
    value = call.value(0)
    assert value is not None
    return as_array(list(value.shape)[call.get("start", 0) : call.get("end")])


def _size(call: Call) -> Value:
    value = call.value(0)
    assert value is not None
    return as_array([math.prod(value.shape)]).reshape(())


def _reshape(call: Call) -> Value:
    value, target = call.value(0), call.sizes(1)
    assert value is not None
    assert target is not None
    if not call.get("allowzero", 0):
        target = [
            value.shape[place] if not is_symbolic(size) and size == 0 else size
            for place, size in enumerate(target)
        ]
    if isinstance(value, np.ndarray):
        return value.reshape(target)
    if call.batch:
        target = without_batch(value.shape, target, call.batch)
    return value.reshape(target)


def _flatten(call: Call) -> Value:
    value, axis = call.tensor(0), call.get("axis", 1)
    axis = axis % value.dim() if axis < 0 else axis
    if axis == 1:
        return value.flatten(1)
    return value.reshape(math.prod(value.shape[:axis]), math.prod(value.shape[axis:]))


def _transpose(call: Call) -> Value:
    value = call.value(0)
    assert value is not None
    order = call.get("perm") or list(range(len(value.shape)))[::-1]
    return value.transpose(order) if isinstance(value, np.ndarray) else value.permute(order)


def _squeeze(call: Call) -> Value:
    value, axes = call.value(0), call.sizes(1, "axes")
    assert value is not None
    if axes is None:
        axes = [
            place for place, size in enumerate(value.shape) if not is_symbolic(size) and size == 1
        ]
    places = {axis % len(value.shape) for axis in axes}
    kept = [size for place, size in enumerate(value.shape) if place not in places]
    return value.reshape(kept)


def _unsqueeze(call: Call) -> Value:
    value, axes = call.value(0), call.sizes(1, "axes")
    assert value is not None
    assert axes is not None
    rank = len(value.shape) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        if isinstance(value, np.ndarray):
            value = np.expand_dims(value, axis)
        else:
            value = value.unsqueeze(axis)
    return value


def _concat(call: Call) -> Value:
    values = [value for value in call.inputs if value is not None]
    axis = call.get("axis", 0)
    if all(isinstance(value, np.ndarray) for value in values):
        return np.concatenate([np.asarray(value) for value in values], axis)
    tensors = list(map(as_tensor, values))
    batch = next((t.shape[0] for t in tensors if is_symbolic(t.shape[0])), None)
    if call.batch and batch is not None and axis % tensors[0].dim() != 0:
        tensors = [t if is_symbolic(t.shape[0]) else _repeated(t, batch) for t in tensors]
    return torch.cat(tensors, axis)


def _repeated(constant: Tensor, batch: Any) -> Tensor:
    """A constant that a file repeats for its batch, such as a class token, for any batch."""
    return constant[:1].expand(batch, *constant.shape[1:])


def _split(call: Call) -> Result:
    value, sizes, axis = call.value(0), call.sizes(1, "split"), call.get("axis", 0)
    assert value is not None
    if sizes is None:
        count = call.get("num_outputs", call.outputs)
        each = -(-value.shape[axis] // count)
        sizes = [each] * (count - 1) + [value.shape[axis] - each * (count - 1)]
    if isinstance(value, np.ndarray):
        ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
        parts = zip([0, *ends], ends, strict=False)
        return [np.take(value, range(start, end), axis) for start, end in parts]
    return list(torch.split(value, sizes, axis))


def _slice(call: Call) -> Value:
    value, starts, ends = call.value(0), call.sizes(1, "starts"), call.sizes(2, "ends")
    assert value is not None
    assert starts is not None
    assert ends is not None
    axes = call.sizes(3, "axes") or list(range(len(starts)))
    steps = call.sizes(4) or [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis %= len(value.shape)
        if isinstance(value, np.ndarray):
            whole = (slice(None),) * axis
            stop = None if step < 0 and end < -value.shape[axis] else end
            value = value[(*whole, slice(start, stop, step))]
        elif step > 0:
            length = value.shape[axis]
            stop = length if not is_symbolic(end) and end >= 2**31 - 1 else end
            value = torch.ops.aten.slice.Tensor(value, axis, start, stop, step)
        else:
            length = int(value.shape[axis])
            order = list(range(length))[slice(start, None if end < -length else end, step)]
            value = value.index_select(axis, torch.tensor(order))
    return value


def _gather(call: Call) -> Value:
    data, indices, axis = call.value(0), call.value(1), call.get("axis", 0)
    assert data is not None
    assert indices is not None
    if isinstance(data, np.ndarray) and isinstance(indices, np.ndarray):
        return np.asarray(np.take(data, indices.astype(np.int64), axis))
    data = as_tensor(data)
    axis %= data.dim()
    if isinstance(indices, np.ndarray):
        length = data.shape[axis]
        if indices.ndim == 0:
            return data.select(axis, as_size(indices.item()))
        if (each := _of_each_image(data, indices, call.batch)) is not None:
            return each
        if is_symbolic(length):
            raise NotImplementedError(
                "it picks from a batch by number, which cannot be made dynamic; "
                "export the ONNX file with a dynamic batch"
            )
        indices = torch.from_numpy(np.where(indices < 0, indices + length, indices))
    shape = [*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]]
    return data.index_select(axis, indices.reshape(-1).long()).reshape(shape)


def _of_each_image(row: Tensor, indices: np.ndarray[Any, Any], batch: int) -> Tensor | None:
    """Pick values of a flat row, for any batch, where numbers written for one pick so.

    Exporters write a view with other strides as numbers into the flattened tensor.

    Args:
        row: [images * values of an image], or another tensor.
        indices: Numbers into it.
        batch: The batch that they were written for; 0 where none is fixed.

    Returns:
        [images, *indices.shape[1:]]; None where the numbers do not pick the same of each image.
    """
    if not batch or row.dim() != 1 or not is_symbolic(row.shape[0]):
        return None
    if len(indices) != batch or not indices.size:
        return None
    length = size_at(row.shape[0], 1)
    starts = (length * np.arange(batch)).reshape(-1, *(1,) * (indices.ndim - 1))
    places = indices - starts
    if (places != places[0]).any() or not 0 <= places.min() <= places.max() < length:
        return None
    picked = row.reshape(-1, length).index_select(1, torch.from_numpy(places[0].reshape(-1)))
    return picked.reshape(-1, *indices.shape[1:])


def _expand(call: Call) -> Value:
    value, target = call.value(0), call.sizes(1)
    assert value is not None
    assert target is not None
    rank = max(len(value.shape), len(target))
    sizes = [1] * (rank - len(value.shape)) + list(value.shape)
    wanted = [1] * (rank - len(target)) + target
    _limit([size for size in wanted if not is_symbolic(size)])
    shape = [
        size if is_symbolic(size) or (not is_symbolic(want) and want == 1) else want
        for size, want in zip(sizes, wanted, strict=True)
    ]
    if isinstance(value, np.ndarray) and not any(map(is_symbolic, shape)):
        return np.broadcast_to(value, shape)
    return as_tensor(value).expand(shape)


def _tile(call: Call) -> Value:
    value, repeats = call.value(0), call.sizes(1)
    assert value is not None
    assert repeats is not None
    _limit([math.prod(map(int, value.shape[1:])), *(r for r in repeats if not is_symbolic(r))])
    return np.tile(value, repeats) if isinstance(value, np.ndarray) else value.repeat(repeats)


def _constant_of_shape(call: Call) -> Value:
    sizes = call.sizes(0) or []
    filling = np.asarray(call.get("value", np.zeros(1, np.float32))).reshape(-1)[0]
    if any(map(is_symbolic, sizes)):
        return torch.full(sizes, filling.item(), dtype=torch.from_numpy(np.array(filling)).dtype)
    _limit(sizes)
    return np.full(sizes, filling)


def _limit(sizes: Sequence[int]) -> None:
    if math.prod(max(size, 1) for size in sizes) > _LARGEST:
        raise NotImplementedError(f"it makes a constant of {'x'.join(map(str, sizes))} values")


def _range(call: Call) -> Value:
    values = [call.known(place) for place in range(3)]
    if any(value.dtype.kind == "f" for value in values):
        start, limit, step = (float(value.item()) for value in values)
    else:
        start, limit, step = (as_size(value.item()) for value in values)
    if not is_symbolic(limit):
        _limit([math.ceil(abs(limit - start) / (abs(step) or 1))])
        return np.arange(start, limit, step)
    return torch.arange(start, limit, step)


def _cast(call: Call) -> Value:
    value, kind = call.value(0), call.get("to")
    assert value is not None
    if call.kind == "CastLike":
        like = call.value(1)
        assert like is not None
        kind = helper.np_dtype_to_tensor_dtype(_array_type(like))
    if kind in _FLOATS:
        if isinstance(value, np.ndarray):
            return value if value.dtype == object else value.astype(np.float32)
        return value.float()
    if kind not in _TYPES:
        raise NotImplementedError(f"it casts to {TensorProto.DataType.Name(kind).lower()}")
    wanted = np.dtype(_TYPES[kind])
    if isinstance(value, np.ndarray):
        return value if value.dtype == object else value.astype(wanted)
    return value.to(torch.from_numpy(np.zeros(1, wanted)).dtype)


def _array_type(value: Value) -> np.dtype[Any]:
    """The type of a value as NumPy's; sizes that depend on the batch are int64."""
    if isinstance(value, Tensor):
        return torch.empty(0, dtype=value.dtype).numpy().dtype
    return np.dtype(np.int64) if value.dtype == object else value.dtype


def _pad(call: Call) -> Value:
    value, pads = call.tensor(0), call.sizes(1, "pads")
    assert pads is not None
    listed = call.sizes(3)
    axes = list(range(value.dim())) if listed is None else [axis % value.dim() for axis in listed]
    begin = dict(zip(axes, pads[: len(axes)], strict=True))
    end = dict(zip(axes, pads[len(axes) :], strict=True))
    mode = _PADDINGS[call.get("mode", "constant")]
    padded = [axis for axis in axes if begin[axis] or end[axis]]
    if not padded:
        return value
    first = min(padded) if mode == "constant" else min(*padded, value.dim() - 2)
    order = range(value.dim() - 1, first - 1, -1)
    amounts = list(
        itertools.chain.from_iterable((begin.get(axis, 0), end.get(axis, 0)) for axis in order)
    )
    if mode != "constant":
        return F.pad(value, amounts, mode)
    return F.pad(value, amounts, mode, call.number(2, "value", 0.0) or 0.0)


def _depth_to_space(call: Call) -> Value:
    value, block = call.tensor(0), call.get("blocksize")
    count, channels, height, width = value.shape
    inner = channels // block**2
    if call.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(value, block)
    split = value.reshape(count, block, block, inner, height, width)
    return split.permute(0, 3, 4, 1, 5, 2).reshape(count, inner, height * block, width * block)


def _space_to_depth(call: Call) -> Value:
    value, block = call.tensor(0), call.get("blocksize")
    count, channels, height, width = value.shape
    split = value.reshape(count, channels, height // block, block, width // block, block)
    moved = split.permute(0, 3, 5, 1, 2, 4)
    return moved.reshape(count, channels * block**2, height // block, width // block)


def _scatter(call: Call) -> Value:
    """Write into a constant, such as a mask of windows."""
    if call.get("reduction", "none") != "none":
        raise NotImplementedError("it adds to what it writes over")
    data, places, updates = map(call.known, range(3))
    written = np.array(data)
    written[tuple(np.moveaxis(places, -1, 0).astype(int))] = updates
    return written


RULES: dict[str, Rule] = {
    "Cast": _cast,
    "CastLike": _cast,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ScatterND": _scatter,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""What each operator computes."""

KNOWN_INPUTS: dict[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,),
    "Clip": (1, 2),
    "CumSum": (1,),
    "Expand": (1,),
    "Gather": (1,),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "ScatterND": (0, 1, 2),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
"""The inputs of an operator whose values must be known while PyTorch traces."""

"""ONNX operators that compute: products, normalisation, activations, arithmetic, reductions."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ccam_deploy.export.from_onnx.call import Call, Result, Rule, Value, as_tensor

_HARD_SIGMOID = 1 / 6
_SELU = (1.6732632423543772, 1.0507009873554805)


def _batch_norm(call: Call) -> Tensor:
    value, scale, bias, mean, variance = map(call.tensor, range(5))
    if call.get("training_mode", 0):
        if not call.constant:
            raise NotImplementedError("it is in training mode; export the model in evaluation mode")
        # Of constants, as weights that a network standardises are.
        return F.batch_norm(value, None, None, scale, bias, True, 0.0, call.get("epsilon", 1e-5))
    return F.batch_norm(value, mean, variance, scale, bias, False, 0.0, call.get("epsilon", 1e-5))


def _instance_norm(call: Call) -> Tensor:
    value, scale, bias = map(call.tensor, range(3))
    if all(size == 1 for size in value.shape[2:]):  # PyTorch refuses these: nothing but the bias
        shape = [-1, *[1] * (value.dim() - 2)]
        return (value - value) * scale.reshape(shape) + bias.reshape(shape)
    return F.instance_norm(value, weight=scale, bias=bias, eps=call.get("epsilon", 1e-5))


def _group_norm(call: Call) -> Tensor:
    value, scale, bias = map(call.tensor, range(3))
    groups = call.get("num_groups")
    if len(scale) == groups != value.shape[1]:
        scale, bias = (x.repeat_interleave(int(value.shape[1]) // groups) for x in (scale, bias))
    return F.group_norm(value, groups, scale, bias, call.get("epsilon", 1e-5))


def _layer_norm(call: Call) -> Tensor:
    value, scale, bias = call.tensor(0), call.tensor(1), call.optional_tensor(2)
    shape = list(value.shape[call.get("axis", -1) :])
    epsilon = call.get("epsilon", 1e-5)
    if list(scale.shape) == shape:
        return F.layer_norm(value, shape, scale, bias, epsilon)
    scaled = F.layer_norm(value, shape, eps=epsilon) * scale
    return scaled if bias is None else scaled + bias


def _gemm(call: Call) -> Tensor:
    left, right, added = call.tensor(0), call.tensor(1), call.optional_tensor(2)
    left = left.t() if call.get("transA", 0) else left
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    plain = alpha == beta == 1 and (added is None or added.dim() == 1)
    if plain and added is not None:
        return F.linear(left, right if call.get("transB", 0) else right.t(), added)
    product = left @ (right.t() if call.get("transB", 0) else right)
    product = product if alpha == 1 else product * alpha
    if added is None:
        return product
    return product + (added if beta == 1 else added * beta)


def _softmax(call: Call) -> Tensor:
    run = F.softmax if call.kind == "Softmax" else F.log_softmax
    value = call.tensor(0)
    if call.opset >= 13:
        return run(value, call.get("axis", -1))
    axis = call.get("axis", 1) % value.dim()
    if axis == value.dim() - 1:
        return run(value, axis)
    return run(value.flatten(axis), -1).reshape(value.shape)


def _clip(call: Call) -> Tensor:
    value, low, high = call.tensor(0), call.number(1, "min"), call.number(2, "max")
    if low is not None and (low, high) in ((0, 6), (-1, 1)):
        return F.hardtanh(value, low, high or 0)  # ReLU6 and the hard tanh, with their gradient
    if low == 0 and high is None:
        return F.relu(value)
    return value if low is None and high is None else value.clamp(low, high)


def _prelu(call: Call) -> Tensor:
    value, slope = call.tensor(0), call.tensor(1)
    aligned = [1] * (value.dim() - slope.dim()) + list(slope.shape)
    of_channels = [1, value.shape[1], *[1] * (value.dim() - 2)]
    if slope.numel() == 1 or aligned == of_channels:
        return F.prelu(value, slope.reshape(-1))
    return value.relu() + slope * value.clamp(max=0)


def _hard_sigmoid(call: Call) -> Tensor:
    value, alpha, beta = call.tensor(0), call.get("alpha", 0.2), call.get("beta", 0.5)
    if math.isclose(alpha, _HARD_SIGMOID, rel_tol=1e-5) and beta == 0.5:
        return F.hardsigmoid(value)
    scaled: Tensor = value * alpha + beta
    return scaled.clamp(0, 1)


def _reduction(call: Call) -> Value:
    axes = call.sizes(1, "axes")
    value, kept = call.value(0), bool(call.get("keepdims", 1))
    assert value is not None
    if not axes:
        if call.get("noop_with_empty_axes", 0):  # what is not reduced is squared and the like
            if call.kind in _PLAIN_REDUCTIONS:
                return value
            return _REDUCTIONS[call.kind](as_tensor(value).unsqueeze(-1), [-1], False)
        axes = list(range(len(value.shape)))
    if isinstance(value, np.ndarray) and call.kind in _ARRAY_REDUCTIONS:
        reduced = _ARRAY_REDUCTIONS[call.kind](value, axis=tuple(axes), keepdims=kept)
        whole = call.kind == "ReduceMean" and value.dtype.kind == "i"
        return np.asarray(np.trunc(reduced).astype(value.dtype) if whole else reduced)
    value = as_tensor(value)
    if call.kind == "ReduceProd":
        for axis in sorted((axis % value.dim() for axis in axes), reverse=True):
            value = value.prod(axis, kept)
        return value
    return _REDUCTIONS[call.kind](value, axes, kept)


_ARRAY_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceMax": np.max,
    "ReduceMean": np.mean,
    "ReduceMin": np.min,
    "ReduceProd": np.prod,
    "ReduceSum": np.sum,
}
_PLAIN_REDUCTIONS = tuple(_ARRAY_REDUCTIONS)
"""Those of a single value are the value."""
_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceL1": lambda x, axes, kept: x.abs().sum(axes, kept),
    "ReduceL2": lambda x, axes, kept: torch.linalg.vector_norm(x, 2, axes, kept),
    "ReduceLogSum": lambda x, axes, kept: x.sum(axes, kept).log(),
    "ReduceLogSumExp": lambda x, axes, kept: x.logsumexp(axes, kept),
    "ReduceMax": lambda x, axes, kept: x.amax(axes, kept),
    "ReduceMean": lambda x, axes, kept: x.mean(axes, kept),
    "ReduceMin": lambda x, axes, kept: x.amin(axes, kept),
    "ReduceSum": lambda x, axes, kept: x.sum(axes, kept),
    "ReduceSumSquare": lambda x, axes, kept: x.square().sum(axes, kept),
}


def _elementwise(run: Callable[..., Any]) -> Rule:
    """A rule for arrays and tensors alike."""

    def rule(call: Call) -> Value:
        values = [value for value in call.inputs if value is not None]
        if all(isinstance(value, np.ndarray) for value in values):
            return np.asarray(run(*values))
        result: Tensor = run(*map(call.tensor, range(len(values))))
        return result

    return rule


def _tensorwise(run: Callable[..., Tensor]) -> Rule:
    """A rule for tensors alone."""
    return lambda call: run(*(call.tensor(place) for place in range(len(call.inputs))))


def _with(run: Callable[..., Tensor], **defaults: Any) -> Rule:
    """A rule for one tensor with attributes."""
    return lambda call: run(call.tensor(0), *(call.get(n, v) for n, v in defaults.items()))


def _divide(left: Any, right: Any) -> Any:
    """Whole numbers give whole numbers."""
    if isinstance(left, np.ndarray):
        if "f" in (left.dtype.kind, right.dtype.kind):
            return left / right
        if "O" in (left.dtype.kind, right.dtype.kind):  # sizes, which are not negative
            return left // right
        return np.trunc(left / right).astype(left.dtype)
    if left.is_floating_point() or right.is_floating_point():
        return left / right
    return torch.div(left, right, rounding_mode="trunc")


def _fold(run: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def folded(first: Any, *others: Any) -> Any:
        for other in others:
            first = run(first, other)
        return first

    return folded


def _of_type(arrays: Callable[..., Any], tensors: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *v: arrays(*v) if isinstance(v[0], np.ndarray) else tensors(*v)


def _where(call: Call) -> Value:
    values = [call.value(place) for place in range(3)]
    if all(isinstance(value, np.ndarray) for value in values):
        return np.asarray(np.where(*values))  # type: ignore[arg-type]
    chosen, left, right = map(call.tensor, range(3))
    return torch.where(chosen, left, right)


def _mean(call: Call) -> Tensor:
    values = [call.tensor(place) for place in range(len(call.inputs))]
    total: Tensor = functools.reduce(operator.add, values)
    return total / len(values)


def _einsum(call: Call) -> Tensor:
    values = map(call.tensor, range(len(call.inputs)))
    summed: Tensor = torch.einsum(call.get("equation"), *values)
    return summed


def _top_k(call: Call) -> Result:
    (count,) = call.sizes(1) or [int(call.get("k", 1))]
    found = call.tensor(0).topk(count, call.get("axis", -1), bool(call.get("largest", 1)))
    return [found.values, found.indices]


def _modulo(call: Call) -> Value:
    left, right = call.value(0), call.value(1)
    arrays = isinstance(left, np.ndarray) and isinstance(right, np.ndarray)
    if not call.get("fmod", 0):
        return _elementwise(operator.mod)(call)  # type: ignore[return-value]
    if arrays:
        return np.asarray(np.fmod(left, right))  # type: ignore[arg-type]
    return torch.fmod(call.tensor(0), call.tensor(1))


def _selu(call: Call) -> Tensor:
    value, alpha, gamma = call.tensor(0), call.get("alpha", _SELU[0]), call.get("gamma", _SELU[1])
    if np.allclose((alpha, gamma), _SELU, rtol=1e-6):
        return F.selu(value)
    scaled: Tensor = gamma * F.elu(value, alpha)
    return scaled


def _swish(call: Call) -> Tensor:
    value, alpha = call.tensor(0), call.get("alpha", 1.0)
    scaled: Tensor = value * (alpha * value).sigmoid()
    return F.silu(value) if alpha == 1 else scaled


def _trilu(call: Call) -> Tensor:
    diagonal = int(call.number(1) or 0)
    value = call.tensor(0)
    return value.triu(diagonal) if call.get("upper", 1) else value.tril(diagonal)


def _cumulative_sum(call: Call) -> Tensor:
    if call.get("exclusive", 0) or call.get("reverse", 0):
        raise NotImplementedError("it adds up backwards, or without the value itself")
    return call.tensor(0).cumsum(int(call.number(1) or 0))


def _identity(call: Call) -> Value:
    value = call.value(0)
    assert value is not None
    return value


RULES: dict[str, Rule] = {
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    **dict.fromkeys((*_REDUCTIONS, "ReduceProd"), _reduction),
    **dict.fromkeys(("Identity", "Dropout"), _identity),
    "Abs": _elementwise(abs),
    "Add": _elementwise(operator.add),
    "And": _elementwise(_of_type(np.logical_and, torch.logical_and)),
    "BatchNormalization": _batch_norm,
    "Ceil": _elementwise(_of_type(np.ceil, torch.ceil)),
    "Celu": _with(F.celu, alpha=1.0),
    "Clip": _clip,
    "Cos": _tensorwise(torch.cos),
    "CumSum": _cumulative_sum,
    "Div": _elementwise(_divide),
    "Einsum": _einsum,
    "Elu": _with(F.elu, alpha=1.0),
    "Equal": _elementwise(_of_type(np.equal, torch.eq)),
    "Erf": _tensorwise(torch.erf),
    "Exp": _tensorwise(torch.exp),
    "Floor": _elementwise(_of_type(np.floor, torch.floor)),
    "Gelu": lambda call: F.gelu(call.tensor(0), approximate=call.get("approximate", "none")),
    "Gemm": _gemm,
    "Greater": _elementwise(operator.gt),
    "GreaterOrEqual": _elementwise(operator.ge),
    "GroupNormalization": _group_norm,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _tensorwise(F.hardswish),
    "InstanceNormalization": _instance_norm,
    "LRN": lambda call: F.local_response_norm(
        call.tensor(0),
        call.get("size"),
        call.get("alpha", 1e-4),
        call.get("beta", 0.75),
        call.get("bias", 1.0),
    ),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _with(F.leaky_relu, alpha=0.01),
    "Less": _elementwise(operator.lt),
    "LessOrEqual": _elementwise(operator.le),
    "Log": _tensorwise(torch.log),
    "MatMul": _tensorwise(torch.matmul),
    "Max": _elementwise(_fold(_of_type(np.maximum, torch.maximum))),
    "Mean": _mean,
    "Min": _elementwise(_fold(_of_type(np.minimum, torch.minimum))),
    "Mish": _tensorwise(F.mish),
    "Mod": _modulo,
    "Mul": _elementwise(operator.mul),
    "Neg": _elementwise(operator.neg),
    "Not": _elementwise(_of_type(np.logical_not, torch.logical_not)),
    "Or": _elementwise(_of_type(np.logical_or, torch.logical_or)),
    "PRelu": _prelu,
    "Pow": _elementwise(operator.pow),
    "Reciprocal": _tensorwise(torch.reciprocal),
    "Relu": _tensorwise(F.relu),
    "Round": _elementwise(_of_type(np.round, torch.round)),
    "Selu": _selu,
    "Sigmoid": _tensorwise(torch.sigmoid),
    "Sign": _elementwise(_of_type(np.sign, torch.sign)),
    "Sin": _tensorwise(torch.sin),
    "Softplus": _tensorwise(F.softplus),
    "Softsign": _tensorwise(F.softsign),
    "Sqrt": _elementwise(_of_type(np.sqrt, torch.sqrt)),
    "Sub": _elementwise(operator.sub),
    "Sum": _elementwise(_fold(operator.add)),
    "Swish": _swish,
    "Tanh": _tensorwise(torch.tanh),
    "ThresholdedRelu": lambda call: F.threshold(call.tensor(0), call.get("alpha", 1.0), 0.0),
    "TopK": _top_k,
    "Trilu": _trilu,
    "Where": _where,
    "Xor": _elementwise(_of_type(np.logical_xor, torch.logical_xor)),
}
"""What each operator computes."""

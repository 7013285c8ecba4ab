"""TorchScript code, run operator by operator in Python, where torch.export can follow it.

PyTorch's own interpreter turns sizes into plain numbers, so a program traced through it has the
batch of its example. Here a size stays what it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ccam_deploy.errors import SourceError


class Scope(nn.Module):
    """A TorchScript module with its parameters, buffers and children, and its code in Python.

    Args:
        script: The TorchScript module.
    """

    def __init__(self, script: torch.jit.ScriptModule) -> None:
        super().__init__()
        self._script = (script,)  # a tuple hides it: it is no child
        self.training = script.training
        for name, parameter in script.named_parameters(recurse=False):
            self.register_parameter(name, nn.Parameter(parameter.detach(), requires_grad=False))
        for name, buffer in script.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, child in script.named_children():
            self.add_module(name, Scope(child))  # type: ignore[arg-type]

    def forward(self, *inputs: Any, method: str = "forward") -> Any:
        """Run a method of the TorchScript module, as a part of the model that has a name."""
        return self.run_script(method, *inputs)

    def run_script(self, method: str, *inputs: Any) -> Any:
        """Run a method of the TorchScript module."""
        graph = self._graph(method)
        names = [value.debugName() for value in graph.inputs()]
        (result,) = self._run(graph, dict(zip(names, (self, *inputs), strict=True)))
        return result

    def script_attribute(self, name: str) -> Any:
        """Return a parameter, buffer or child of this module, else the script's own value."""
        for held in (self._parameters, self._buffers, self._modules):
            if name in held:
                return held[name]
        return self.training if name == "training" else getattr(self._script[0], name)

    def _graph(self, method: str) -> Any:
        graph = self._script[0]._c._get_method(method).graph
        if any(node.kind() == "prim::CallFunction" for node in _all_nodes(graph)):
            graph = graph.copy()
            _inline_functions(graph)
        return graph

    def _run(self, block: Any, values: dict[str, Any]) -> list[Any]:
        """Run a graph, or a block of one."""
        for node in block.nodes():
            inputs = [values[value.debugName()] for value in node.inputs()]
            branch = self._branch(node, inputs, values)
            results = _results(node, inputs) if branch is None else branch
            names = [value.debugName() for value in node.outputs()]
            values.update(zip(names, results, strict=True))
        return [values[value.debugName()] for value in block.outputs()]

    def _branch(self, node: Any, inputs: list[Any], values: dict[str, Any]) -> list[Any] | None:
        """What a node gives that runs other code; None for other nodes."""
        kind = node.kind()
        if kind in ("prim::CallMethod", _CALL):
            scope, *arguments = inputs
            if scope is self:
                return [self.run_script(node.s("name"), *arguments)]
            return [scope(*arguments, method=node.s("name"))]
        if kind == "prim::If":
            blocks = list(node.blocks())
            return self._run(blocks[0 if inputs[0] else 1], values)
        if kind == "prim::Loop":
            (body,) = node.blocks()
            names = [value.debugName() for value in body.inputs()]
            count, more, *carried = inputs
            for index in range(count):
                if not more:
                    break
                values.update(zip(names, (index, *carried), strict=True))
                more, *carried = self._run(body, values)
            return carried
        return None


def _inline_functions(graph: Any) -> None:
    """Put functions' code in the place of their calls; those of modules' methods stay."""
    for node in list(_all_nodes(graph)):
        if node.kind() == "prim::CallMethod":
            kept = graph.create(_CALL, list(node.inputs()), node.outputsSize())
            kept.s_("name", node.s("name"))
            kept.insertBefore(node)
            for old, new in zip(node.outputs(), kept.outputs(), strict=True):
                new.setType(old.type())
                old.replaceAllUsesWith(new)
            node.destroy()
    torch._C._jit_pass_inline(graph)


def _all_nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _all_nodes(inner)


def _results(node: Any, inputs: list[Any]) -> Sequence[Any]:
    """What a node gives that computes one thing."""
    kind: str = node.kind()
    if kind == "prim::Constant":
        return [_constant(node)]
    if kind == "prim::GetAttr":
        scope, name = inputs[0], node.s("name")
        return [scope.script_attribute(name) if isinstance(scope, Scope) else getattr(scope, name)]
    if kind in ("prim::ListUnpack", "prim::TupleUnpack"):
        return list(inputs[0])
    if kind in _STRUCTURAL:
        results = [_STRUCTURAL[kind](*inputs)]
    elif kind in _SCALAR and not any(isinstance(value, Tensor) for value in inputs):
        results = [_SCALAR[kind](*inputs)]
    else:
        results = [_operator_value(node, inputs)]
    return results[: node.outputsSize()]


def _constant(node: Any) -> Any:
    """A constant; tensors of one number become the number, as traced sizes are computed with."""
    value = node.output().toIValue()
    if isinstance(value, Tensor) and value.dim() == 0:
        with _disable_current_modes():
            return value.item()
    return value


def _operator_value(node: Any, inputs: Sequence[Any]) -> Any:
    """What one of PyTorch's operators gives, whose last arguments may have to be named."""
    library, _, name = node.kind().partition("::")
    found = None if name in _REFUSED or library != "aten" else getattr(torch.ops.aten, name, None)
    if found is None:
        raise SourceError(
            f"the TorchScript code calls {node.kind()}, which cannot be exported; save the "
            "original model with torch.export.save(torch.export.export(model, ...)) and pass "
            "that .pt2 file"
        )
    arguments = torch._C.parse_schema(node.schema()).arguments
    named = {
        argument.name: value
        for argument, value in zip(arguments, inputs, strict=True)
        if argument.kwarg_only and value is not None
    }
    count = sum(not argument.kwarg_only for argument in arguments)
    return found(*inputs[:count], **named)


def _size(value: Tensor, axis: int | None = None) -> Any:
    return list(value.shape) if axis is None else value.shape[axis]


def _raise(message: str, *_: object) -> None:
    raise SourceError(f"the TorchScript code refuses the images: {message}")


def _slice(values: Any, start: int | None = None, stop: int | None = None, step: int = 1) -> Any:
    return values[start:stop:step]


def _append(values: list[Any], value: Any) -> list[Any]:
    values.append(value)
    return values


_CALL = "ccam::CallMethod"
"""A call of a method, by a name that inlining does not know."""

_REFUSED = ("from_file", "save")
"""Operators that touch files."""

_STRUCTURAL: dict[str, Callable[..., Any]] = {
    "prim::ListConstruct": lambda *values: list(values),
    "prim::TupleConstruct": lambda *values: values,
    "prim::TupleIndex": operator.getitem,
    "prim::DictConstruct": lambda *pairs: dict(zip(pairs[::2], pairs[1::2], strict=True)),
    "prim::NumToTensor": lambda number: number,
    "prim::unchecked_cast": lambda value: value,
    "prim::unchecked_unwrap_optional": lambda value: value,
    "aten::_unwrap_optional": lambda value: value,
    "prim::Uninitialized": lambda: None,
    "prim::data": lambda value: value.detach(),
    "prim::dtype": lambda value: value.dtype,
    "prim::device": lambda value: value.device,
    "prim::layout": lambda value: value.layout,
    "prim::is_cuda": lambda value: value.is_cuda,
    "prim::RaiseException": _raise,
    "aten::size": _size,
    "aten::dim": lambda value: value.dim(),
    "aten::numel": lambda value: value.numel(),
    "aten::is_floating_point": lambda value: value.is_floating_point(),
    "aten::append": _append,
    "aten::__getitem__": operator.getitem,
    "aten::__is__": operator.is_,
    "aten::__isnot__": operator.is_not,
    "aten::len": len,
    "aten::list": list,
    "aten::warn": lambda *_: None,
    # Without one library's settings, with which PyTorch 2.10 cannot trace a free batch.
    "aten::_convolution": lambda *values: torch.ops.aten.convolution.default(*values[:9]),
}
"""Operators on lists, sizes and types, and those that are called in a form of their own."""

_SCALAR: dict[str, Callable[..., Any]] = {
    "aten::add": lambda a, b, _=1: a + b,
    "aten::sub": lambda a, b, _=1: a - b,
    "aten::mul": operator.mul,
    "aten::div": lambda a, b, rounding=None: a // b if rounding else a / b,
    "aten::floordiv": operator.floordiv,
    "aten::floor_divide": operator.floordiv,
    "aten::remainder": operator.mod,
    "aten::pow": operator.pow,
    "aten::neg": operator.neg,
    "aten::eq": operator.eq,
    "aten::ne": operator.ne,
    "aten::lt": operator.lt,
    "aten::le": operator.le,
    "aten::gt": operator.gt,
    "aten::ge": operator.ge,
    "aten::__not__": operator.not_,
    "aten::__and__": lambda a, b: a and b,
    "aten::__or__": lambda a, b: a or b,
    "aten::__contains__": operator.contains,
    "aten::__range_length": lambda start, stop, step: len(range(start, stop, step)),
    "aten::__derive_index": lambda index, start, step: start + index * step,
    "aten::Int": lambda value: value if isinstance(value, torch.SymInt) else int(value),
    "aten::Float": float,
    "aten::Bool": bool,
    "aten::IntImplicit": lambda value: value,
    "aten::FloatImplicit": lambda value: value,
    "aten::ScalarImplicit": lambda value: value,
    "aten::floor": math.floor,
    "aten::ceil": math.ceil,
    "aten::sqrt": math.sqrt,
    "aten::slice": _slice,
    "aten::format": str.format,
    "prim::min": min,
    "prim::max": max,
}
"""Operators on numbers and lists, which PyTorch has for tensors too."""

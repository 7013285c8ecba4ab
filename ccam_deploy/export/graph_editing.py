"""Constants and nodes of graphs, added and removed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher

aten: Any = torch.ops.aten
TO_THE_END = 2**62
"""What a slice that goes to the end of an axis, however long, says at least."""
_SYMBOL = re.compile(r"\b[su]\d+\b")


def without_symbols(text: object) -> str:
    """Write "batch" for PyTorch's symbols of it, in a message."""
    return _SYMBOL.sub("batch", str(text))


def operator_name(target: Any) -> str:
    """An operator's name as PyTorch's users know it."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__).strip("_")
    return str(getattr(target, "__name__", target))


def same_shape(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Compare shapes without asking PyTorch whether symbols are equal, which would fix the batch.

    Args:
        first: Sizes, some of which may depend on the batch.
        second: Others.
    """
    return [_plain(size) for size in first] == [_plain(size) for size in second]


def _plain(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def place_constant(root: nn.Module, graph: fx.Graph, value: torch.Tensor, name: str) -> fx.Node:
    """Add a constant tensor of an unused name to a graph and to the module that holds it."""
    root.register_buffer(name, value.detach().clone().contiguous())
    return graph.get_attr(name)


def cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a tensor to another floating-point type; integers and booleans stay as they are."""
    return value.to(dtype) if value.is_floating_point() else value


def fresh_constant(module: fx.GraphModule, value: torch.Tensor, hint: str) -> fx.Node:
    """Add a constant tensor to a graph module at its current insertion point."""
    name = next(name for name in _names(hint) if not hasattr(module, name))
    return place_constant(module, module.graph, value, name)


class Writer:
    """Writes nodes for what another node stands for, as parts of its module of the classifier.

    They come at the current insertion point, with the fake tensors that they give.

    Args:
        module: The graph module.
        node: The other node.
    """

    def __init__(self, module: fx.GraphModule, node: fx.Node) -> None:
        self._module = module
        self._node = node

    def call(self, target: Any, *args: Any) -> fx.Node:
        """Write a call of an operator."""
        node = self._module.graph.call_function(target, args)
        values = fx.map_arg(args, lambda source: source.meta["val"])
        with self._mode(), enable_python_dispatcher():
            node.meta["val"] = target(*values)
        node.meta["nn_module_stack"] = self._node.meta.get("nn_module_stack")
        node.meta["written"] = True
        return node

    def constant(self, value: torch.Tensor, hint: str) -> fx.Node:
        """Write a constant."""
        node = fresh_constant(self._module, value, hint)
        node.meta["val"] = self._mode().from_tensor(value, static_shapes=True)
        return node

    def is_read(self, output: int) -> bool:
        """Whether anything reads an output of the other node, which has several."""
        return any(user.args[1] == output and user.users for user in self._node.users)

    def _mode(self) -> Any:
        value = self._node.meta["val"]
        return (value[0] if isinstance(value, tuple) else value).fake_mode


def take_place(module: fx.GraphModule, node: fx.Node, new: fx.Node) -> None:
    """Put a node, which gets its meta data, in the place of another one."""
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)


def placeholders(module: fx.GraphModule) -> list[fx.Node]:
    """Return the inputs of a graph, in their order."""
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def drop_unused(module: fx.GraphModule) -> None:
    """Remove nodes and constants that nothing reads."""
    module.graph.eliminate_dead_code()
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in list(module.named_buffers()):
        if name not in used:
            delattr(module, name)
    module.recompile()


def _names(hint: str) -> Iterator[str]:
    yield hint
    number = 1
    while True:
        yield f"{hint}_{number}"
        number += 1

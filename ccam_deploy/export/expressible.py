"""Which operators have a form in ONNX: known before a conversion takes its time."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ccam_deploy.errors import LoweringError, brief
from ccam_deploy.export.graph_editing import operator_name, without_symbols
from ccam_deploy.export.lowering.table import decompositions
from ccam_deploy.export.onnx_registry import registered_operators
from ccam_deploy.export.program import Program, module_of


def require_expressible(program: Program) -> None:
    """Refuse a classifier with an operator that has no form in ONNX.

    Args:
        program: The classifier.

    Raises:
        LoweringError: The message names the module and the operator.
    """
    for node in inexpressible(program.graph.graph):
        if node.target not in decompositions():
            raise LoweringError(f"{describe(node)} has no form in ONNX")


def require_expressible_gradient(*graphs: fx.GraphModule) -> None:
    """Refuse graphs of a gradient with an operator that has no form in ONNX.

    Args:
        *graphs: What the gradient was cut into.

    Raises:
        LoweringError: The message names the operator.
    """
    for graph in graphs:
        for node in inexpressible(graph.graph):
            raise LoweringError(
                f"the model's gradient needs {operator_name(node.target)}, "
                "which has no form in ONNX"
            )


def describe(node: fx.Node) -> str:
    """Name a node's module and operator, for a message."""
    return f"{operator_name(node.target)} in {where(node)}"


def where(node: fx.Node) -> str:
    """Name a node's module, for a message."""
    name = module_of(node)
    return f'layer "{name}"' if name else "the model itself"


def plain_reason(error: BaseException) -> str:
    """Another library's error in one line, with the batch in place of its symbols."""
    while error.__cause__ is not None:
        error = error.__cause__
    return without_symbols(brief(error))


def inexpressible(graph: fx.Graph) -> Iterator[fx.Node]:
    """Find the nodes that no conversion to ONNX knows, and that are not made of others it knows.

    Args:
        graph: A graph of ATen operators.

    Yields:
        The nodes; none where the installed PyTorch does not tell.
    """
    known = _known_operators()
    for node in graph.nodes:
        if not known or not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = _qualified_name(node.target)
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(
            name, "CompositeImplicitAutograd"
        )
        if name not in known and not composite:
            yield node


def _qualified_name(target: Any) -> str:
    return str(target.name())


@functools.cache
def _known_operators() -> frozenset[str]:
    """Names of operators with a conversion or a decomposition; none where PyTorch does not tell."""
    registered = registered_operators()
    if registered is None:
        return frozenset()
    decomposed = {**torch.export.default_decompositions(), **torch._decomp.decomposition_table}
    overloads = (target for target in decomposed if isinstance(target, torch._ops.OpOverload))
    names = map(_qualified_name, overloads)
    return frozenset([*names, *registered])

"""Names of modules for the nodes of an ONNX graph, as PyTorch's exporters and others leave them."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from typing import Any

_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where PyTorch's newer exporter says in which modules a node lies."""


def node_scopes(nodes: Sequence[Any]) -> list[tuple[str, ...]]:
    """Name the modules around each node, the outermost first.

    Args:
        nodes: ONNX's NodeProto, in order.

    Returns:
        Dotted names, such as ("layer1", "layer1.0", "layer1.0.conv1"); the node's own name, or its
        operator's with a number, for a node that lies in no module.
    """
    counts: Counter[str] = Counter()
    found = []
    for node in nodes:
        scopes = _recorded(node) or _from_path(node.name)
        if not scopes:
            own = _plain(node.name) or node.op_type
            counts[own] += 1
            scopes = (own if node.name or counts[own] == 1 else f"{own}_{counts[own] - 1}",)
        found.append(scopes)
    return found


def _recorded(node: Any) -> tuple[str, ...]:
    """The modules of the newer exporter: the model "" first, the operator last."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            try:
                names = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                return ()
            if isinstance(names, list) and all(isinstance(name, str) for name in names):
                return tuple(name for name in names[:-1] if name)
    return ()


def _from_path(name: str) -> tuple[str, ...]:
    """The modules of a path such as /layer1/layer1.0/conv1/Conv.

    A container's child repeats the container's name; any other child has its own alone.
    """
    parts = [part for part in name.split("/")[:-1] if part]
    scopes: list[str] = []
    for index, part in enumerate(parts):
        before = parts[index - 1] if index else ""
        if before and part.startswith(f"{before}."):
            scopes.append(f"{scopes[-1]}{part.removeprefix(before)}")
        else:
            scopes.append(f"{scopes[-1]}.{part}" if scopes else part)
    return tuple(scopes)


def _plain(name: str) -> str:
    return name.strip("/").replace("/", ".")

"""Parts of a recorded graph, and the values that pass from one part to another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ccam_deploy.errors import LoweringError
from ccam_deploy.export.graph_editing import Writer, aten, drop_unused
from ccam_deploy.export.simplify import without_sizes


def crossing_values(
    joint: fx.GraphModule, image: fx.Node, output_gradient: fx.Node
) -> list[fx.Node]:
    """Find what the gradient needs of the values that only the image decides.

    Where the batch is not the first axis of such a value, nodes are added that put it there, and
    others that turn it back for its readers.

    Args:
        joint: The graph of both directions.
        image: Its input of the images.
        output_gradient: Its input of the logits' gradient.

    Returns:
        The nodes, with the batch first.
    """
    on_image, on_gradient = _depending(joint, image), _depending(joint, output_gradient)
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in [node for node in joint.graph.nodes if node in on_gradient]:
        for source in node.all_input_nodes:
            if source in on_image and source not in on_gradient:
                readers.setdefault(source, []).append(node)
    return [_batch_first(joint, image, *item) for item in readers.items()]


def _batch_first(
    joint: fx.GraphModule, image: fx.Node, node: fx.Node, readers: Sequence[fx.Node]
) -> fx.Node:
    """The same values with the batch as their first axis, which is undone for their readers.

    Attention in windows has a row for each window of each image, and some put heads first.
    """
    shape = node.meta["val"].shape
    open_axes = [n for n, size in enumerate(shape) if isinstance(size, torch.SymInt)]
    if len(open_axes) != 1:
        sizes = ["batch" if isinstance(size, torch.SymInt) else int(size) for size in shape]
        raise LoweringError(
            f"a gradient takes [{', '.join(map(str, sizes))}], which an operator makes of all "
            "images of a batch, as a normalisation without running statistics does; each image "
            "must be on its own"
        )
    (axis,) = open_axes
    batch = image.meta["val"].shape[0].node.expr
    factor = int(shape[axis].node.expr / batch)
    if axis == 0 and factor == 1:
        return node
    order = [axis, *(other for other in range(len(shape)) if other != axis)]
    rest = [int(shape[other]) for other in order[1:]]
    back = [order.index(position) for position in range(len(shape))]
    write, packed = Writer(joint, node), node
    with joint.graph.inserting_before(node.next):
        if axis:
            packed = write.call(aten.permute.default, packed, order)
        if factor != 1:
            packed = write.call(aten.reshape.default, packed, [-1, factor, *rest])
        unpacked = packed
        if factor != 1:
            unpacked = write.call(aten.reshape.default, unpacked, [-1, *rest])
        if axis:
            unpacked = write.call(aten.permute.default, unpacked, back)
    for reader in readers:
        reader.replace_input_with(node, unpacked)
    return packed


def _depending(joint: fx.GraphModule, root: fx.Node) -> set[fx.Node]:
    """The nodes whose values, not only whose batch size, depend on `root`."""
    depending = {root}
    for node in joint.graph.nodes:
        if node.target is aten.sym_size.int:
            continue
        if any(source in depending for source in node.all_input_nodes):
            depending.add(node)
    return depending


def extract(
    joint: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    """Copy the part of a graph between some nodes, with the constants and sizes it uses.

    Args:
        joint: The whole graph.
        inputs: Its nodes that become inputs of the part; the batch is the first axis of each.
        outputs: Its nodes that become outputs.

    Returns:
        The part.

    Raises:
        KeyError: An output depends on more than the inputs.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta.update(node.meta)
    for node in joint.graph.nodes:
        if node in copies or node.op not in ("call_function", "get_attr"):
            continue
        if node.target is aten.sym_size.int:
            # The batch is the only size that is not known, and the first axis of every input.
            copies[node] = graph.call_function(aten.sym_size.int, (copies[inputs[0]], 0))
            copies[node].meta.update(node.meta)
        elif all(source in copies for source in node.all_input_nodes):
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node in outputs))
    part = fx.GraphModule(joint, graph)
    without_sizes(part)
    drop_unused(part)
    return part

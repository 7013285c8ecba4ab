"""The block outputs of networks that keep their feature maps as tokens or with channels last."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor, fx

from ccam_deploy.export.arrangements import Followed
from ccam_deploy.export.graph_editing import aten, operator_name
from ccam_deploy.export.places import Arrangement
from ccam_deploy.export.program import Program

SPREAD = 4
"""How many blocks are chosen where all of them work at one resolution."""

_MIXING = ("scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "mm")
"""Products whose results have the tokens of a factor, but depend on all of them."""
_SHAPING = (
    aten.reshape.default,
    aten.view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.clone.default,
)


class Blocks:
    """Residual sums whose tensors hold a feature map.

    Args:
        program: The classifier.
        followed: The arrangements of its tensors.
        outputs: The nodes that are the outputs of modules.
    """

    def __init__(self, program: Program, followed: Followed, outputs: Collection[fx.Node]) -> None:
        self._order = {node: place for place, node in enumerate(program.graph.graph.nodes)}
        self._followed = followed
        self._outputs = outputs
        self._influential = _influential(program, followed)
        depending = {program.image}
        self._sums = []
        for node in self._order:
            sources = [n for n in node.all_input_nodes if n in depending]
            if sources:
                depending.add(node)
            if node.target is aten.add.Tensor and len(sources) == 2 and self._map(node):
                self._sums.append(self._given(node))

    def has_influence(self, node: fx.Node) -> bool:
        """Tell whether the map in a node's tensor, not only its other tokens, reaches the logits.

        Args:
            node: A node.
        """
        return node in self._influential

    def choose(
        self, convolved: Sequence[fx.Node], bottlenecks: Collection[fx.Node]
    ) -> list[fx.Node]:
        """Choose the tensors to explain with.

        Args:
            convolved: The last map [B, C, h, w] of each resolution that convolutions work at.
            bottlenecks: The nodes that everything passes through.

        Returns:
            `convolved` itself for a network without block outputs in another form; else the last
            of each resolution, or outputs of blocks spread over the depth. In the order of the
            network.
        """
        sums = [node for node in self._sums if node in bottlenecks]
        blocks = self._ends(sums)
        if not blocks and not convolved:
            sums = self._sums
            blocks = self._ends(sums)
        if not blocks:
            return list(convolved)
        if len({self._grid(node) for node in sums}) == 1:
            return spread(blocks, SPREAD)
        last: dict[tuple[int, int], fx.Node] = {}
        maps = [_unmoved(node, blocks) for node in convolved]
        for node in sorted({*maps, *blocks}, key=self._order.__getitem__):
            grid = self._grid(node)
            last.pop(grid, None)
            last[grid] = node
        return list(last.values())

    def _given(self, node: fx.Node) -> fx.Node:
        """What a module gives of a sum that it only brings to another shape; else the sum."""
        value = node
        while value not in self._outputs and len(value.users) == 1:
            (value,) = value.users
            if value.target not in _SHAPING or not self._map(value):
                return node
        return value if value in self._outputs else node

    def _ends(self, sums: Iterable[fx.Node]) -> list[fx.Node]:
        """Sums in another form than [B, C, h, w], those that end a module if any do."""
        found = [n for n in sums if n in self._influential and self._is_rearranged(n)]
        return [node for node in found if node in self._outputs] or found

    def _is_rearranged(self, node: fx.Node) -> bool:
        """Whether a map is in another form than [B, C, h, w]; shuffled channels still have that."""
        arrangement = self._map(node)
        return arrangement is not None and not arrangement.channels_first

    def _map(self, node: fx.Node) -> Arrangement | None:
        arrangement = self._followed.of(node)
        return arrangement if arrangement is not None and arrangement.is_map else None

    def _grid(self, node: fx.Node) -> tuple[int, int]:
        arrangement = self._map(node)
        if arrangement is not None:
            return arrangement.grid
        _, _, height, width = node.meta["val"].shape
        return int(height), int(width)


def _unmoved(node: fx.Node, blocks: Collection[fx.Node]) -> fx.Node:
    """The block whose output a node holds in another order of axes; else the node."""
    source = node
    while source.target in (aten.permute.default, aten.transpose.int, aten.clone.default):
        source = source.all_input_nodes[0]
    return source if source in blocks else node


def spread(nodes: Sequence[fx.Node], count: int) -> list[fx.Node]:
    """Choose nodes at equal distances, the last one among them.

    Args:
        nodes: All of them.
        count: How many at most.

    Returns:
        The chosen ones, in their order.
    """
    count = min(count, len(nodes))
    return [nodes[round((place + 1) * len(nodes) / count) - 1] for place in range(count)]


def _influential(program: Program, followed: Followed) -> set[fx.Node]:
    """The nodes whose values reach the logits, those of the map where other tokens stand beside it.

    An operator whose result has such tokens too keeps them apart from the map, unless it is a
    product of tokens; every other one mixes what it gets, and all nodes lead to the logits.
    """
    reached = {program.logits}
    for node in reversed(program.graph.graph.nodes):
        for user in node.users:
            if not isinstance(user.meta.get("val"), (Tensor, tuple, list)):
                continue  # the size of the batch
            apart = _keeps_apart(user, followed)
            if not _drops_map(node, user, followed) and (user in reached or not apart):
                reached.add(node)
    return reached


def _keeps_apart(node: fx.Node, followed: Followed) -> bool:
    """Whether tokens with and without a place stay themselves in an operator's results."""
    if isinstance(node.meta["val"], tuple | list):
        return True
    arrangement = followed.of(node)
    padded = arrangement is not None and any(axis.padded for axis in arrangement.axes)
    return padded and operator_name(node.target) not in _MIXING


def _drops_map(node: fx.Node, user: fx.Node, followed: Followed) -> bool:
    """Whether a slice or a selection takes nothing but tokens that have no place in the map."""
    arrangement = followed.of(node)
    arguments: Any = user.args
    if arrangement is None or arguments[:1] != (node,):
        return False
    rank = len(arrangement.axes)
    number = arguments[1] if len(arguments) > 1 else 0
    if user.target not in (aten.select.int, aten.slice.Tensor):
        return False
    axis = arrangement.axes[number % rank]
    if not axis.padded:
        return False
    if user.target is aten.select.int:
        index = arguments[2]
        taken = range(index % axis.size, index % axis.size + 1)
    else:
        start, end, step = [*arguments[2:], None, None, None][:3]
        taken = range(axis.size)[slice(start, end, step)]
    return not any(axis.before <= place < axis.before + axis.inner for place in taken)

"""Target layers: the feature maps that an explanation is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ccam_deploy.errors import LayerError
from ccam_deploy.export.arrangements import Followed
from ccam_deploy.export.blocks import Blocks
from ccam_deploy.export.graph_editing import aten
from ccam_deploy.export.places import Arrangement
from ccam_deploy.export.program import Program, name_of, stack_of, was_traced

DEFAULT_COUNT = 4
_NCHW = (0, 1, 2, 3)


@dataclass(frozen=True)
class TargetLayer:
    """A feature map to explain with.

    Attributes:
        name: The dotted name of the module whose output it is. A module that is called several
            times names its last output; "name:1" is that of its first call. Where the output is no
            module's, the node's name.
        node: The node of the program's graph that holds it.
        arrangement: How the node's tensor holds it; None where it is the map [B, C, h, w] itself.
    """

    name: str
    node: fx.Node
    arrangement: Arrangement | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        if self.arrangement is not None:
            return self.arrangement.channels, *self.arrangement.grid
        _, channels, height, width = self.node.meta["val"].shape
        return int(channels), int(height), int(width)

    @property
    def rest_shape(self) -> tuple[int, ...] | None:
        """The shape of `rest` for one image; None where the map is all of the tensor."""
        if self.arrangement is None or not self.arrangement.left_out:
            return None
        sizes = [
            axis.before + axis.after if axis.padded else axis.size for axis in self.arrangement.axes
        ]
        return tuple(sizes[1:])

    def features(self, value: Tensor) -> Tensor:
        """Take the feature map [B, C, h, w] out of the node's tensor."""
        return value if self.arrangement is None else self.arrangement.to_map(value)

    def rest(self, value: Tensor) -> Tensor | None:
        """Take what is not in the map out of the node's tensor: class and register tokens."""
        if self.arrangement is None or not self.arrangement.left_out:
            return None
        return self.arrangement.rest(value)

    def tensor(self, features: Tensor, rest: Tensor | None) -> Tensor:
        """Put a feature map, and the rest, together as the node's tensor."""
        return features if self.arrangement is None else self.arrangement.from_map(features, rest)


def find_layers(program: Program, names: Sequence[str] | None = None) -> tuple[TargetLayer, ...]:
    """Find the target layers by name, or those that suit a classifier.

    Without names, they are the last tensors of each of the last four resolutions that convolutions
    or blocks of tokens work at, maps of a single pixel left out. Where all blocks work at one
    resolution, they are the outputs of four blocks, spread over the depth and the last one among
    them. Only tensors that all of the input's influence passes through count: the output of a
    residual stage, not a tensor inside the next one. Of tokens, only those count whose map has an
    influence: not behind the last block of a classifier that reads nothing but its class token.

    Args:
        program: The classifier.
        names: Modules or nodes; None to choose.

    Returns:
        The layers, shallow ones first.

    Raises:
        LayerError: A name is unknown, repeated or no feature map, or none could be chosen.
    """
    outputs = _module_outputs(program)
    followed = Followed(program)
    blocks = Blocks(program, followed, set(outputs.values()))
    if names is None:
        layers = _chosen(program, outputs, followed, blocks)
    else:
        layers = [_named(program, outputs, followed, blocks, name) for name in names]
    order = {node: position for position, node in enumerate(program.graph.graph.nodes)}
    if len({layer.node for layer in layers}) != len(layers) or not layers:
        raise LayerError(f"the layers {', '.join(names or ())} do not name different feature maps")
    return tuple(sorted(layers, key=lambda layer: order[layer.node]))


def _chosen(
    program: Program, outputs: dict[str, fx.Node], followed: Followed, blocks: Blocks
) -> list[TargetLayer]:
    bottlenecks = set(filter(was_traced, _bottlenecks(program)))
    nodes = blocks.choose(_last_of_each_resolution(program, bottlenecks), bottlenecks)
    if not nodes:
        raise LayerError(
            "no feature map was found that all of the input passes through; "
            f"name target layers; the model has {_known(outputs, followed)}"
        )
    chosen = nodes[-DEFAULT_COUNT:]
    return [TargetLayer(_name(node, outputs), node, _arranged(followed, node)) for node in chosen]


def _named(
    program: Program,
    outputs: dict[str, fx.Node],
    followed: Followed,
    blocks: Blocks,
    name: str,
) -> TargetLayer:
    called = [node for node in program.graph.graph.nodes if node.op == "call_function"]
    nodes = {name_of(node): node for node in called if was_traced(node)}
    node = outputs.get(name, nodes.get(name))
    if node is None:
        raise LayerError(f'layer "{name}" is not in the model; it has {_known(outputs, followed)}')
    value, arrangement = node.meta.get("val"), _arranged(followed, node)
    if arrangement is None and (not isinstance(value, Tensor) or value.dim() != 4):
        raise LayerError(
            f'layer "{name}" gives no feature map [batch, channels, height, width], nor tokens of '
            f"one; these do: {_known(outputs, followed)}"
        )
    if arrangement is not None and not blocks.has_influence(node):
        raise LayerError(
            f'the feature map of layer "{name}" has no influence on the logits, which read other '
            "tokens of it; name a layer before it"
        )
    return TargetLayer(name, node, arrangement)


def _arranged(followed: Followed, node: fx.Node) -> Arrangement | None:
    """How a node's tensor holds a map; None where it is one, or none is known."""
    arrangement = followed.of(node)
    if arrangement is None or not arrangement.is_map or arrangement.plain:
        return None
    return arrangement


def _known(outputs: dict[str, fx.Node], followed: Followed, limit: int = 24) -> str:
    """Names of the modules that give feature maps, outer ones first."""
    last = {name: node for name, node in outputs.items() if ":" not in name}
    maps = [n for n, node in last.items() if _is_map(node) or _arranged(followed, node)]
    if not maps:
        return "no modules; name a node of the traced program"
    names = sorted(maps, key=lambda name: name.count("."))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _is_map(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 4:
        return False
    # One that depends on the batch is none; to ask for its number would fix the batch.
    sides = list(value.shape[2:])
    return all(isinstance(side, int) for side in sides) and sides != [1, 1]


def _module_outputs(program: Program) -> dict[str, fx.Node]:
    """The output of each call of a module: the last of its nodes that something outside reads.

    The last call goes by the module's name, the others by "name:1", "name:2" and so on.
    """
    calls: dict[str, dict[str, fx.Node]] = {}
    for node in program.graph.graph.nodes:
        if node.op != "call_function":
            continue
        inside = {key: name for key, name in stack_of(node).items() if name}
        for key, name in inside.items():
            if any(key not in stack_of(user) for user in node.users):
                calls.setdefault(name, {})[key] = node
    outputs: dict[str, fx.Node] = {}
    for name, nodes in calls.items():
        *earlier, outputs[name] = nodes.values()
        outputs |= {f"{name}:{call}": node for call, node in enumerate(earlier, 1)}
    return outputs


def _name(node: fx.Node, outputs: dict[str, fx.Node]) -> str:
    """The outermost module whose output the node is, else the node's own name."""
    names = [name for name, output in outputs.items() if output is node]
    return min(names, key=lambda name: name.count("."), default=name_of(node))


def _last_of_each_resolution(program: Program, bottlenecks: set[fx.Node]) -> list[fx.Node]:
    convolved: set[tuple[int, int]] = set()
    last: dict[tuple[int, int], fx.Node] = {}
    axes: dict[fx.Node, tuple[int, ...]] = {program.image: _NCHW}
    for node in program.graph.graph.nodes:
        if node.op != "call_function":
            continue
        axes[node] = _axes(node, axes)
        if not _is_map(node) or axes[node] != _NCHW:
            continue
        _, _, height, width = node.meta["val"].shape
        if node.target in (aten.conv2d.default, aten.convolution.default):
            convolved.add((height, width))
        if node in bottlenecks:
            last.pop((height, width), None)
            last[height, width] = node
    return [node for resolution, node in last.items() if resolution in convolved]


def _axes(node: fx.Node, axes: dict[fx.Node, tuple[int, ...]]) -> tuple[int, ...]:
    """Which axis of an NCHW tensor each axis of a node's output is; () where that is unknown."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 4:
        return ()
    if node.target in (aten.conv2d.default, aten.convolution.default):
        return _NCHW
    source = next((axes[n] for n in node.all_input_nodes if axes.get(n)), ())
    if source and node.target is aten.permute.default:
        permutation: Any = node.args[1]
        return tuple(source[axis] for axis in permutation)
    if node.target in (aten.reshape.default, aten.transpose.int):
        return ()
    return source


def _bottlenecks(program: Program) -> set[fx.Node]:
    """The nodes that every path from the input to the logits passes through."""
    kinds = (Tensor, tuple, list)
    nodes = [n for n in program.graph.graph.nodes if isinstance(n.meta.get("val"), kinds)]
    before = dict.fromkeys(nodes, 0)
    before[program.image] = 1
    for node in nodes:
        before[node] += sum(before.get(source, 0) for source in node.all_input_nodes)
    after = dict.fromkeys(nodes, 0)
    after[program.logits] = 1
    for node in reversed(nodes):
        after[node] += sum(after.get(user, 0) for user in node.users)
    total = before[program.logits]
    return {node for node in nodes if before[node] * after[node] == total}

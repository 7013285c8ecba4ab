"""The graphs of a bundle, converted to ONNX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import fx, nn

from ccam_deploy.engines.networks import REST
from ccam_deploy.errors import LayerError
from ccam_deploy.export.autodiff import (
    Differentiated,
    differentiate,
    differentiate_input,
    has_relu,
)
from ccam_deploy.export.excitation import excite, why_not
from ccam_deploy.export.expressible import require_expressible, require_expressible_gradient
from ccam_deploy.export.graph_editing import aten, cast, drop_unused, placeholders
from ccam_deploy.export.layers import TargetLayer
from ccam_deploy.export.onnx_conversion import GraphInput, to_onnx
from ccam_deploy.export.program import Program
from ccam_deploy.export.simplify import leave_batch_open, without_sizes
from ccam_deploy.export.tensor_cores import (
    Blocks,
    add_biases_apart,
    cut_into_blocks,
    pool_before_bias,
    read_blocks,
)

_BATCH, _MASKS = 2, 3
"""Lengths of the dynamic axes in examples."""


@dataclass(frozen=True)
class Graphs:
    """ONNX models of one precision.

    backbone: images [B, C, H, W] -> logits, feature_0.., residual_0..; with a head also rest, what
        the last layer's tensor holds beside its map, such as class tokens [B, 1, C]
    gradient: residual_0.., output_gradient [B, classes] -> gradient_0..
    classifier: images [B, C, H, W], masks [N, 1, H, W], owner [N] int64 -> logits [N, classes]
    head: features [N, C, h, w] of the last layer, and the rest if there is any -> logits
        [N, classes]; only where it is wanted
    input_gradient, guided_gradient: images, output_gradient [B, classes] -> input_gradient
        [B, C, H, W]; the second with ReLUs that pass back positive gradients only.
    excitation: images, winners [B, classes], duals [B, classes] -> excitation_0.. [B, h, w]
    """

    backbone: ir.Model
    gradient: ir.Model
    classifier: ir.Model
    head: ir.Model | None = None
    input_gradient: ir.Model | None = None
    guided_gradient: ir.Model | None = None
    excitation: ir.Model | None = None

    def items(self) -> Iterator[tuple[str, ir.Model]]:
        """Each graph's name and model."""
        yield "backbone", self.backbone
        yield "gradient", self.gradient
        yield "classifier", self.classifier
        if self.head is not None:
            yield "head", self.head
        if self.input_gradient is not None:
            yield "input_gradient", self.input_gradient
        if self.guided_gradient is not None:
            yield "guided_gradient", self.guided_gradient
        if self.excitation is not None:
            yield "excitation", self.excitation


def convert_graphs(
    program: Program,
    layers: Sequence[TargetLayer],
    dtype: torch.dtype = torch.float32,
    with_head: bool = False,
    with_gradients: bool = False,
) -> Graphs:
    """Build and convert the graphs of a classifier.

    Args:
        program: the classifier.
        layers: its target layers.
        dtype: what the graphs compute in, float32 or float16.
        with_head: convert the head too.
        with_gradients: convert the graphs of the image's gradient too; no guided one for a
            classifier without ReLU. Where the classifier can have it, the excitation graph, which
            is in float32 alone.

    Returns:
        The ONNX models, with their weights in memory.

    Raises:
        LoweringError: ONNX cannot express an operator; the message names it and its module.
        LayerError: a head is asked for, and the last layer is no cut through the classifier.
    """
    require_expressible(program)
    parts = differentiate(program, layers, dtype, with_head)
    require_expressible_gradient(parts.backbone, parts.gradient)
    if dtype == torch.float16:
        read_blocks(parts.backbone, program.input_shape)
        pool_before_bias(parts.backbone)
        add_biases_apart(parts.backbone)
    images = _images(program, dtype)
    scores = _scores(program, dtype)
    residuals = {
        f"residual_{index}": GraphInput(_example_size(node), "batch", node.meta["val"].dtype)
        for index, node in enumerate(placeholders(parts.gradient)[:-1])
    }

    def convert(graph: fx.GraphModule, inputs: Mapping[str, GraphInput], *outputs: str) -> ir.Model:
        return to_onnx(graph, inputs, outputs)

    features = [f"feature_{index}" for index in range(len(layers))]
    rest_shape = layers[-1].rest_shape if with_head else None
    if rest_shape is not None:
        features.append(REST)
    gradients = [f"gradient_{index}" for index in range(len(layers))]
    backbone = convert(parts.backbone, {"images": images}, "logits", *features, *residuals)
    gradient = convert(parts.gradient, {**residuals, "output_gradient": scores}, *gradients)
    masked_inputs = {
        "images": images,
        "masks": GraphInput((_MASKS, 1, *program.input_shape[1:]), "masks", dtype),
        "owner": GraphInput((_MASKS,), "masks", torch.int64),
    }
    classifier = convert(masked_classifier(program, dtype), masked_inputs, "logits")
    head = plain = guided = excitation = None
    if with_head:
        maps = {"features": GraphInput((_MASKS, *layers[-1].shape), "masks", dtype)}
        if rest_shape is not None:
            maps[REST] = GraphInput((_MASKS, *rest_shape), "masks", dtype)
        head = convert(_head(parts, layers), maps, "logits")
    if with_gradients:
        plain = input_gradient_graph(program, dtype)
        if has_relu(program):
            guided = input_gradient_graph(program, dtype, guided=True)
        if dtype == torch.float32 and not why_not(program, layers):
            names = [f"excitation_{index}" for index in range(len(layers))]
            inputs = {"images": images, "winners": scores, "duals": scores}
            excitation = convert(excite(program, layers), inputs, *names)
    return Graphs(backbone, gradient, classifier, head, plain, guided, excitation)


def input_gradient_graph(
    program: Program, dtype: torch.dtype = torch.float32, guided: bool = False
) -> ir.Model:
    """Convert the graph of the images' gradient; see differentiate_input."""
    graph = differentiate_input(program, dtype, guided)
    inputs = {"images": _images(program, dtype), "output_gradient": _scores(program, dtype)}
    return to_onnx(graph, inputs, ["input_gradient"])


def _images(program: Program, dtype: torch.dtype) -> GraphInput:
    return GraphInput((_BATCH, *program.input_shape), "batch", dtype)


def _scores(program: Program, dtype: torch.dtype) -> GraphInput:
    return GraphInput((_BATCH, program.classes), "batch", dtype)


def _example_size(node: fx.Node) -> tuple[int, ...]:
    """The shape of an example of a value that has the batch first."""
    return (_BATCH, *map(int, node.meta["val"].shape[1:]))


def _head(parts: Differentiated, layers: Sequence[TargetLayer]) -> fx.GraphModule:
    if parts.head is None:
        raise LayerError(
            f'the classifier has no head after layer "{layers[-1].name}": its logits depend '
            "on the image past that layer; export without a head, or with other layers"
        )
    return parts.head


def masked_classifier(program: Program, dtype: torch.dtype) -> fx.GraphModule:
    """Make the graph of masked images' logits.

    Args:
        program: The classifier.
        dtype: What the graph computes in; in float16 it has the form that suits tensor cores.

    Returns:
        The graph (images [B, C, H, W], masks [N, 1, H, W], owner [N] int64, the row of each mask's
        image) -> (logits [N, classes],).
    """
    forward, blocks = _forward(program), None
    if dtype == torch.float16:
        blocks = cut_into_blocks(forward, program.input_shape)
        pool_before_bias(forward)
        add_biases_apart(forward)
    graph = fx.GraphModule(nn.Module(), fx.Graph())
    for name, value in forward.named_buffers():
        graph.register_buffer(name, value)
    images, masks, owner = map(graph.graph.placeholder, ("images", "masks", "owner"))
    copies = {placeholders(forward)[0]: _masked(graph, images, masks, owner, blocks)}
    graph.graph.output(graph.graph.graph_copy(forward.graph, copies))
    for name, value in list(graph.named_buffers()):
        graph.register_buffer(name, cast(value, dtype))
    graph.recompile()
    return graph


def _masked(
    graph: fx.GraphModule, images: fx.Node, masks: fx.Node, owner: fx.Node, blocks: Blocks | None
) -> fx.Node:
    """Write the images under their masks: [N, C, H, W], or in blocks as a convolution takes them.

    Blocks have their channels last when they are masked: no engine turns them round for each mask.
    """
    call = graph.graph.call_function
    if blocks is not None:
        images, masks = blocks.of_images(graph, images), blocks.of_masks(graph.graph, masks)
    owned = call(aten.index_select.default, (images, 0, owner))
    masked = call(aten.mul.Tensor, (owned, masks))
    return masked if blocks is None else blocks.as_input(graph.graph, masked)


def _forward(program: Program) -> fx.GraphModule:
    """The classifier's graph without sizes of the batch."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(program.graph.graph, copies)
    graph.output((copies[program.logits],))
    forward = fx.GraphModule(program.graph, graph)
    leave_batch_open(forward)
    without_sizes(forward)
    drop_unused(forward)
    return forward

"""The gradient of a class score with respect to feature maps, as a graph without autograd.

The forward graph runs once under autograd on fake tensors while `make_fx` records every operator
of both directions. The record is then cut in two: what depends on the gradient that enters at
the logits is the gradient graph; what it needs from the rest are the backbone's residuals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from ccam_deploy.errors import LayerError, LoweringError
from ccam_deploy.export.cutting import crossing_values, extract
from ccam_deploy.export.expressible import plain_reason, where
from ccam_deploy.export.graph_editing import aten, cast, fresh_constant, operator_name, placeholders
from ccam_deploy.export.layers import TargetLayer
from ccam_deploy.export.lowering.table import decompositions
from ccam_deploy.export.program import Program, quiet
from ccam_deploy.export.simplify import simplify

_Outputs = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Differentiated:
    """The two halves of a differentiated classifier; every tensor has the batch first.

    Attributes:
        backbone: images -> (logits, *features, *residuals); where the rest of the last layer's
            tensor is asked for, that comes before the residuals.
        gradient: (*residuals, output_gradient [B, classes]) -> gradients of the feature maps.
        head: The last feature map, and the rest of its tensor where there is any, -> logits; None
            where they depend on the image past it.
    """

    backbone: fx.GraphModule
    gradient: fx.GraphModule
    head: fx.GraphModule | None


def differentiate(
    program: Program,
    layers: Sequence[TargetLayer],
    dtype: torch.dtype = torch.float32,
    with_rest: bool = False,
) -> Differentiated:
    """Differentiate a classifier's logits with respect to the feature maps of `layers`.

    Args:
        program: The classifier.
        layers: Its target layers, the last one last.
        dtype: The type that the graphs compute in; their inputs, outputs and parameters have it.
        with_rest: Give the rest of the last layer's tensor too, if it has any.

    Returns:
        The two halves, and the head.

    Raises:
        LayerError: The logits do not depend on a layer.
        LoweringError: An operator cannot be differentiated or expressed.
    """
    recorder = Recorder(program.graph, layers)

    def outputs(image: Tensor, scores: Tensor, output_gradient: Tensor) -> list[Tensor]:
        features = recorder.features()
        gradients = torch.autograd.grad(scores, features, output_gradient, allow_unused=True)
        for layer, gradient in zip(layers, gradients, strict=True):
            if gradient is None:
                raise LayerError(f'the logits do not depend on layer "{layer.name}"')
        rest = recorder.kept_rest[layers[-1].node]
        return [scores, *features, *([] if rest is None else [rest]), *gradients]

    joint = record(program, recorder, outputs, dtype)
    return _split(joint, layers, with_rest)


def differentiate_input(
    program: Program, dtype: torch.dtype = torch.float32, guided: bool = False
) -> fx.GraphModule:
    """Differentiate a classifier's logits with respect to its images.

    Args:
        program: The classifier.
        dtype: The type that the graph computes in.
        guided: Let every ReLU pass back positive gradients only (Springenberg et al. 2015).

    Returns:
        The graph (images [B, C, H, W], output_gradient [B, classes]) -> (input_gradient
        [B, C, H, W],).

    Raises:
        LoweringError: An operator cannot be differentiated or expressed.
    """
    recorder = (GuidedRecorder if guided else Recorder)(program.graph, ())

    def outputs(image: Tensor, scores: Tensor, output_gradient: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(scores, [image], output_gradient))

    joint = record(program, recorder, outputs, dtype)
    return extract(joint, placeholders(joint), list(joint.graph.output_node().args[0]))  # type: ignore[arg-type]


def has_relu(program: Program) -> bool:
    """Tell whether there is a ReLU whose gradient could be guided."""
    return any(map(_is_relu, program.graph.graph.nodes))


def _is_relu(node: fx.Node) -> bool:
    return node.target is aten.relu.default


class Recorder(fx.Interpreter):
    """Runs the forward graph, keeps the feature maps, and knows where it is.

    A map that lies in a tensor of another form is taken out of it and put back, so that all that
    comes later depends on the map itself.

    Args:
        module: The graph.
        layers: The layers whose feature maps are kept.

    Attributes:
        kept: The feature map [B, C, h, w] of each layer's node, after a run.
        kept_rest: What else that node's tensor holds; None where that is nothing.
        current: The node that runs, or whose gradient does.
    """

    def __init__(self, module: fx.GraphModule, layers: Sequence[TargetLayer]) -> None:
        super().__init__(module)
        self.kept: dict[fx.Node, Tensor] = {}
        self.kept_rest: dict[fx.Node, Tensor | None] = {}
        self.current: fx.Node | None = None
        self._backward = False
        self._layers = {layer.node: layer for layer in layers}

    def features(self) -> list[Tensor]:
        """Return the feature maps of the last run, in the order of the layers."""
        return [self.kept[node] for node in self._layers]

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, keep its value if it is wanted, and follow its gradient."""
        self.current = n
        value = super().run_node(n)
        if n in self._layers:
            layer = self._layers[n]
            features, rest = layer.features(value), layer.rest(value)
            self.kept[n], self.kept_rest[n] = features, rest
            value = layer.tensor(features, rest)
        if isinstance(value, Tensor) and value.grad_fn is not None:
            # Backward, the node whose gradient is being recorded is the current one again.
            value.grad_fn.register_prehook(partial(self._turn_to, n))
        return value

    def complaint(self, error: Exception) -> str:
        """Say what an error stopped, in one line."""
        if self.current is None:
            return f"the model cannot be expressed: {plain_reason(error)}"
        what = "the gradient of " if self._backward else ""
        operator = operator_name(self.current.target)
        reason = plain_reason(error)
        return f"{where(self.current)}: {what}{operator} cannot be expressed: {reason}"

    def _turn_to(self, node: fx.Node, gradients: tuple[Tensor, ...]) -> None:
        self.current, self._backward = node, True


class GuidedRecorder(Recorder):
    """Cuts the negative part off every gradient that comes back to a ReLU's output.

    The ReLU's own derivative then leaves what comes to a positive input.
    """

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, and guide its gradient if it is a ReLU."""
        value = super().run_node(n)
        if _is_relu(n) and value.requires_grad:
            value.register_hook(torch.relu)
        return value


def record(
    program: Program,
    recorder: Recorder,
    outputs: _Outputs,
    dtype: torch.dtype,
    output_gradients: int = 1,
) -> fx.GraphModule:
    """Trace (image, *output_gradients) -> what `outputs` computes from them and the logits.

    Args:
        program: The classifier.
        recorder: Runs its graph.
        outputs: (image, logits, *output_gradients) -> the results of the recorded graph.
        dtype: The type that the graph computes in.
        output_gradients: The number of inputs [B, classes] beside the image.

    Returns:
        The graph of both directions, simplified.

    Raises:
        LayerError: `outputs` raised it.
        LoweringError: An operator cannot be differentiated or expressed.
    """
    mode = program.image.meta["val"].fake_mode
    with mode:
        image = torch.empty_like(program.image.meta["val"], dtype=dtype)
        logits = program.logits.meta["val"]
        upstream = [torch.empty_like(logits, dtype=dtype) for _ in range(output_gradients)]
    constants = {name: cast(value, dtype) for name, value in program.graph.named_buffers()}
    names = list(constants)
    buffers = [mode.from_tensor(value, static_shapes=True) for value in constants.values()]

    def forward_and_backward(
        buffers: list[Tensor], image: Tensor, *upstream: Tensor
    ) -> list[Tensor]:
        image = image.detach().requires_grad_()
        with torch.nn.utils.stateless._reparametrize_module(
            program.graph, dict(zip(names, buffers, strict=True))
        ):
            (scores,) = recorder.run(image)
        return outputs(image, scores, *upstream)

    try:
        with mode, enable_python_dispatcher(), sdpa_kernel(SDPBackend.MATH), quiet():
            joint = make_fx(forward_and_backward, decomposition_table=decompositions())(
                buffers, image, *upstream
            )
    except (LayerError, LoweringError):
        raise
    except Exception as error:
        raise LoweringError(recorder.complaint(error)) from error
    joint = _constants_as_attributes(joint, constants)
    simplify(joint)
    return joint


def _constants_as_attributes(joint: fx.GraphModule, constants: dict[str, Tensor]) -> fx.GraphModule:
    for node, (name, value) in zip(placeholders(joint), constants.items(), strict=False):
        with joint.graph.inserting_before(node):
            constant = fresh_constant(joint, value, name)
            constant.meta.update(node.meta)
        node.replace_all_uses_with(constant)
        joint.graph.erase_node(node)
    joint.recompile()
    return joint


def _split(joint: fx.GraphModule, layers: Sequence[TargetLayer], with_rest: bool) -> Differentiated:
    image, output_gradient = placeholders(joint)
    outputs = list(joint.graph.output_node().args[0])  # type: ignore[arg-type]
    features = outputs[1 : 1 + len(layers)]
    rest, gradients = outputs[1 + len(layers) : -len(layers)], outputs[-len(layers) :]
    forward = [outputs[0], *features, *(rest if with_rest else ())]
    crossing = crossing_values(joint, image, output_gradient)
    backbone = extract(joint, [image], [*forward, *crossing])
    gradient = extract(joint, [*crossing, output_gradient], gradients)
    return Differentiated(backbone, gradient, _head(joint, outputs[0], [features[-1], *rest]))


def _head(
    joint: fx.GraphModule, logits: fx.Node, features: Sequence[fx.Node]
) -> fx.GraphModule | None:
    """The part between the last feature map and the logits, if it needs nothing else."""
    try:
        return extract(joint, features, [logits])
    except KeyError:
        return None

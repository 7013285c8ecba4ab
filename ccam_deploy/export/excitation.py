"""Excitation backpropagation: winning probabilities that go down a classifier, as a graph.

A class that is the winner passes its probability to the units that it was computed from, each in
proportion to what it adds with a positive weight, and so on down to the target layers (Zhang et
al., "Top-down neural attention by excitation backprop", IJCV 2018). Biases take no part. Values
below zero, for which the method is not made, excite nothing, in a layer's input and in a sum.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ccam_deploy.export.autodiff import Recorder, record
from ccam_deploy.export.cutting import extract
from ccam_deploy.export.expressible import describe
from ccam_deploy.export.graph_editing import aten, placeholders
from ccam_deploy.export.layers import TargetLayer
from ccam_deploy.export.program import Program

_LEAST = 1e-20
"""A smaller excitation counts as none: its reciprocal would overflow float32."""

_WEIGHTED = {aten.conv2d.default, aten.convolution.default, aten.linear.default}
_AVERAGED = {aten.mean.dim, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default}
_PASSED = {
    aten.relu.default,
    aten.max_pool2d.default,
    aten.max_pool2d_with_indices.default,
    aten.cat.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.slice.Tensor,
    aten.select.int,
    operator.getitem,
    aten.constant_pad_nd.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.transpose.int,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.clone.default,
    aten.alias.default,
}
"""Operators with a single winner, or that only move values: their gradient passes probabilities."""
_BATCH_NORM = aten._native_batch_norm_legit_no_training.default


def excite(
    program: Program, layers: Sequence[TargetLayer], dtype: torch.dtype = torch.float32
) -> fx.GraphModule:
    """Build the graph that takes winning probabilities from the classes to the target layers.

    Args:
        program: The classifier.
        layers: Its target layers.
        dtype: The type to compute in; half precision cannot hold the smallest probabilities.

    Returns:
        The graph (images [B, C, H, W], winners [B, classes], duals [B, classes]) -> one map
        [B, h, w] for each layer, summed over its channels. `winners` holds the probability that
        each class is the winner, `duals` the same for the class with the signs of its last
        weights turned.

    Raises:
        LoweringError: An operator cannot be expressed.
    """
    recorder = ExcitationRecorder(program, layers)

    def outputs(image: Tensor, *upstream: Tensor) -> list[Tensor]:
        return recorder.maps(*upstream)

    joint = record(program, recorder, outputs, dtype, output_gradients=2)
    return extract(joint, placeholders(joint), list(joint.graph.output_node().args[0]))  # type: ignore[arg-type]


def why_not(program: Program, layers: Sequence[TargetLayer]) -> str:
    """Tell why winning probabilities cannot go down a classifier to its target layers.

    They can where it is made of ReLUs, layers with weights, sums, pooling and moves of values.

    Args:
        program: The classifier.
        layers: Its target layers.

    Returns:
        The reason; empty where they can.
    """
    if program.logits.target is not aten.linear.default:
        return f"the logits come from {describe(program.logits)}, not from a linear layer"
    for node in _between(program, layers):
        if not _has_rule(node):
            return f"{describe(node)} has no rule for winning probabilities"
    return ""


def _between(program: Program, layers: Sequence[TargetLayer]) -> Iterator[fx.Node]:
    """The nodes that lie between some target layer and the logits, from the first on."""
    nodes = list(program.graph.graph.nodes)
    needed = {program.logits}
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    reached = {layer.node for layer in layers}
    for node in nodes:
        if node in needed and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            yield node


def _has_rule(node: fx.Node) -> bool:
    if node.target is aten.add.Tensor:
        return not node.kwargs
    if node.target is aten.mul.Tensor:
        return any(not isinstance(arg, fx.Node) or arg.op == "get_attr" for arg in node.args)
    return node.target in {*_WEIGHTED, *_AVERAGED, *_PASSED, _BATCH_NORM}


class ExcitationRecorder(Recorder):
    """Runs the forward graph, and passes winning probabilities back in place of gradients.

    A batch normalisation passes everything; where it turns signs, the weights of the layer before
    it count with the other sign, as in the method's own code.
    """

    def __init__(self, program: Program, layers: Sequence[TargetLayer]) -> None:
        super().__init__(program.graph, layers)
        self._logits = program.logits
        self._duals: Tensor | None = None

    def maps(self, logits: Tensor, winners: Tensor, duals: Tensor) -> list[Tensor]:
        """Compute the winning probabilities at each layer after a run.

        Args:
            logits: [B, classes], the run's result.
            winners: [B, classes]; see excite.
            duals: [B, classes]; see excite.

        Returns:
            Per layer [B, h, w], summed over channels.
        """
        assert self._duals is not None
        features = self.features()
        probabilities = torch.autograd.grad([logits, self._duals], features, [winners, duals])
        return [probability.sum(1) for probability in probabilities]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute an operator's value, and put its excitation rule in its gradient's place."""
        value = super().call_function(target, args, kwargs)
        sources = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
        if not sources:
            return value
        if target in _WEIGHTED:
            weight = self._turned(args[1])
            if self.current is self._logits:
                self._duals = _share(value, partial(_weighted, target, args, -weight), sources)
            return _share(value, partial(_weighted, target, args, weight), sources)
        if target in _AVERAGED:
            return _share(value, lambda source: target(source, *args[1:], **kwargs), sources)
        if target is aten.add.Tensor and len(sources) == 2:
            return _share(value, target, sources)
        if target is aten.mul.Tensor:
            return _Passed.apply(value, *sources)  # type: ignore[no-untyped-call]
        if target is _BATCH_NORM:
            return (_Passed.apply(value[0], *sources), *value[1:])  # type: ignore[no-untyped-call]
        return value

    def _turned(self, weight: Tensor) -> Tensor:
        """The weights of the current layer with the signs that a scale after it gives them."""
        assert self.current is not None
        after = list(self.current.users)
        if len(after) != 1 or after[0].target not in (aten.mul.Tensor, _BATCH_NORM):
            return weight
        scale = after[0].args[1]
        if not isinstance(scale, fx.Node) or scale.op != "get_attr":
            return weight
        signs: Tensor = getattr(self.module, str(scale.target)).sign().flatten()
        if len(signs) not in (1, len(weight)) or self.current.args[6:7] == (True,):
            return weight
        return weight * signs.view(-1, *[1] * (weight.dim() - 1))


def _weighted(target: Any, args: tuple[Any, ...], weight: Tensor, source: Tensor) -> Tensor:
    """A layer's output without its bias and with its positive weights alone."""
    output: Tensor = target(source, weight.relu(), None, *args[3:])
    return output


def _share(value: Tensor, excitation: Callable[..., Tensor], sources: Sequence[Tensor]) -> Tensor:
    """The value, whose probability the sources share in proportion to what they add.

    `excitation` computes what the positive parts of the sources add up to.
    """
    shared: Tensor = _Shared.apply(value, excitation, *sources)  # type: ignore[no-untyped-call]
    return shared


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, excitation: Callable[..., Tensor], *sources: Tensor
    ) -> Tensor:
        ctx.excitation = excitation
        ctx.save_for_backward(*sources)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, probability: Tensor) -> Any:
        positive = [source.detach().relu().requires_grad_() for source in ctx.saved_tensors]
        with torch.enable_grad():
            total = ctx.excitation(*positive)
        each = torch.where(total > _LEAST, probability / total, 0.0)
        shares = torch.autograd.grad(total, positive, each)
        return None, None, *map(torch.mul, positive, shares)


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, probability: Tensor) -> Any:
        return None, probability

"""What makes probabilities of a traced classifier's outputs, and which of them are its logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import fx

from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.manifest import Activation
from ccam_deploy.errors import OptionError
from ccam_deploy.export.graph_editing import aten, drop_unused, fresh_constant
from ccam_deploy.export.program import Program

_ROUNDING = 1e-3
_ENDS = {
    aten.softmax.int: "softmax",
    aten._softmax.default: "softmax",
    aten.log_softmax.int: "log-softmax",
    aten._log_softmax.default: "log-softmax",
    aten.sigmoid.default: "sigmoid",
}
_ACTIVATIONS: dict[str, Activation] = {
    "softmax": "softmax",
    "log-softmax": "softmax",
    "sigmoid": "sigmoid",
}
"""What makes probabilities of the logits before each end."""
_RESHAPES = (
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.clone.default,
    aten.alias.default,
)


def with_logits(program: Program, wanted: Activation | None = None) -> Program:
    """Find the logits of a traced classifier, and what makes probabilities of them.

    A softmax, its logarithm or a sigmoid at the end is cut off: the gradient of a probability
    vanishes where the network is sure. One logit z becomes the two logits -z and z, of the
    complement and the class: their sigmoids add up to 1.

    Args:
        program: The classifier as it was traced; its graph is changed.
        wanted: The activation that the user names; None for the one that suits the graph. With
            "none", the outputs stay what they are.

    Returns:
        The program with its logits, of at least two classes unless the activation is "none".

    Raises:
        OptionError: The wanted activation does not suit the network.
    """
    if wanted == "none":
        return replace(program, activation=wanted)
    end = final_activation(program)
    found = _ACTIVATIONS.get(end or "")
    single = program.classes == 1
    if wanted == "softmax" and single:
        raise OptionError(
            "the model has one output, and the softmax of one value is always 1; "
            "export with --activation sigmoid, or none for the output as it is"
        )
    if found and wanted and wanted != found:
        raise OptionError(
            f"the model ends in a {end}, which --activation {wanted} does not fit; "
            f"leave the option out, or give {found} or none"
        )
    logits = _without_end(program.logits) if end else program.logits
    if single:
        logits = _two_logits(program.graph, logits)
    program.graph.graph.output_node().args = ((logits,),)
    drop_unused(program.graph)
    activation: Activation = wanted or found or ("sigmoid" if single else "softmax")
    return replace(program, logits=logits, activation=activation, single=single)


def final_activation(program: Program) -> str | None:
    """Tell which activation a classifier ends in, over its classes.

    Returns:
        "softmax", "log-softmax" or "sigmoid"; None for any other end.
    """
    end = _last_computation(program.logits)
    found = _ENDS.get(end.target)
    if found in ("softmax", "log-softmax"):
        value, axis = end.meta["val"], end.args[1]
        over_classes = isinstance(axis, int) and axis % value.dim() == 1
        return found if over_classes and value.shape[1] == program.classes > 1 else None
    return found


def describe_scores(program: Program, end: str | None) -> str:
    """Say in a line what an export made of a classifier's outputs; "" where it took them as logits.

    Args:
        program: The classifier, after `with_logits`.
        end: What it ended in before.
    """
    if program.activation == "none":
        return ""
    lines = []
    if end:
        lines.append(f"the model ends in a {end}, which is left out: its logits are explained")
    if program.single:
        lines.append("the model has one output: it scores class 1, its negative class 0")
    return "; ".join([*lines, "--activation none keeps the output as it is"] if lines else [])


def warn_of_probabilities(outputs: Floats) -> str:
    """Say in a line that outputs [B, classes] taken as logits may be probabilities, "" if not."""
    if outputs.min() < 0 or outputs.max() > 1:
        return ""
    found = "lie between 0 and 1"
    if np.abs(outputs.sum(axis=1) - 1).max() < _ROUNDING:
        found = "add up to 1"
    return (
        f"warning: the model's outputs {found} on the calibration images; if they are "
        "probabilities, export with --activation none"
    )


def _reshapes(outputs: fx.Node) -> Iterator[fx.Node]:
    """The nodes from the outputs up that change their shape alone, and are read by nobody else."""
    node = outputs
    while node.target in _RESHAPES and isinstance(node.args[0], fx.Node) and len(node.users) == 1:
        yield node
        node = node.args[0]


def _last_computation(outputs: fx.Node) -> fx.Node:
    for node in _reshapes(outputs):
        outputs = node.args[0]  # type: ignore[assignment]
    return outputs


def _without_end(outputs: fx.Node) -> fx.Node:
    """Cut off the activation at the end; returns the node of the logits."""
    end, chain = _last_computation(outputs), list(_reshapes(outputs))
    source = end.args[0]
    assert isinstance(source, fx.Node)
    if not chain:
        return source
    chain[-1].replace_input_with(end, source)
    return outputs


def _two_logits(module: fx.GraphModule, logits: fx.Node) -> fx.Node:
    """[B, 1] to [B, 2], of the complement and the class."""
    with module.graph.inserting_after(logits):
        signs = fresh_constant(module, torch.tensor([[-1.0, 1.0]]), "signs")
    with module.graph.inserting_after(signs):
        both = module.graph.call_function(aten.mul.Tensor, (logits, signs))
    value = logits.meta["val"]
    with value.fake_mode:
        signs.meta["val"] = torch.empty(1, 2)
        both.meta["val"] = value * signs.meta["val"]
    return both

"""What makes a bundle that agrees with PyTorch worthless all the same, said in one line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ccam_deploy.arrays import Floats
from ccam_deploy.export.layers import TargetLayer
from ccam_deploy.export.program import Program
from ccam_deploy.fidelity.observation import Observation

_ROUNDED = 1e-3
"""A relative error of the logits, as large as that of fp32 graphs with random weights may be."""

_SHALLOW = 0.5
"""The share of a network's operators before a layer, below which it is a shallow one."""


def doubts_about_layers(program: Program, layers: Sequence[TargetLayer]) -> Iterator[str]:
    """Doubt target layers that were found by themselves.

    Args:
        program: The classifier.
        layers: Its target layers.

    Yields:
        Lines that name the layer.
    """
    if len(layers) > 1:
        return
    nodes = [node for node in program.graph.graph.nodes if node.op == "call_function"]
    before = (nodes.index(layers[0].node) + 1) / len(nodes)
    if before < _SHALLOW:
        yield (
            f'the only target layer that was found, "{layers[0].name}", is a shallow one: '
            f"{1 - before:.0%} of the network's operators come after it; name deeper layers"
        )


def doubts_about_rounding(change: float) -> Iterator[str]:
    """Doubt logits that rounding changes, as it may where weights are random.

    Args:
        change: The relative error of PyTorch's logits where every pixel changes in its last digit.

    Yields:
        A line with the change.
    """
    if change > _ROUNDED:
        yield (
            f"in PyTorch itself the logits change by {change:.1%} where pixels change in their "
            "last digit"
        )


def doubts_about_values(observation: Observation, names: Sequence[str]) -> Iterator[str]:
    """Doubt what PyTorch computes for the calibration images.

    Args:
        observation: What it computes.
        names: The target layers' names.

    Yields:
        Lines that name the value.
    """
    logits = observation.logits
    if not logits.any():
        yield f"every logit of the {len(logits)} calibration images is zero"
    elif len(logits) > 1 and not _differs(logits):
        yield f"the logits of the {len(logits)} calibration images are all the same"
    elif logits.shape[1] > 1 and not _differs(logits.T):
        yield f"the classes' logits are all the same on the {len(logits)} calibration images"
    for name, gradients in zip(names, observation.gradients, strict=True):
        if not gradients.any():
            yield f'the gradients of layer "{name}" are zero on every calibration image'
        elif gradients[0].size > 1 and not _differs(gradients.reshape(len(gradients), -1).T):
            yield f'the gradients of layer "{name}" are the same everywhere'


def _differs(rows: Floats) -> bool:
    """Whether any row is not the first one."""
    return bool(np.any(rows != rows[:1]))

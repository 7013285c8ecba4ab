"""How far graphs may be from PyTorch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
from msgspec import UNSET

from ccam_deploy.bundle.manifest import Fidelity, PrecisionName
from ccam_deploy.errors import OptionError


@dataclass(frozen=True)
class Tolerance:
    """Bounds on the quantities of a `Fidelity`; one that is None is not checked.

    Attributes:
        logits: The largest relative error of the logits; see `Fidelity` for its measure.
        masked_logits: The largest error of the logits of masked images.
        features: The largest error of a layer's feature maps.
        gradients: The largest error of a layer's gradients.
        saliency_rank: The smallest rank correlation of saliency maps, in [-1, 1].
        saliency_similarity: The smallest structural similarity of saliency maps, in [-1, 1].
        saliency_overlap: The smallest share of salient pixels in common, in [0, 1].
        head: The largest error of the logits computed from the last layer's features.
        input_gradient: The largest error of the images' gradients.
        guided_gradient: The largest error of the images' guided gradients.
        excitation: The largest error of a layer's excitation maps.
    """

    logits: float | None = None
    masked_logits: float | None = None
    features: float | None = None
    gradients: float | None = None
    saliency_rank: float | None = None
    saliency_similarity: float | None = None
    saliency_overlap: float | None = None
    head: float | None = None
    input_gradient: float | None = None
    guided_gradient: float | None = None
    excitation: float | None = None

    def bounds(self) -> dict[str, float]:
        """Return the bounds that are checked, by quantity."""
        return {name: bound for name, bound in asdict(self).items() if bound is not None}

    def with_bounds(self, bounds: Mapping[str, float]) -> Tolerance:
        """Replace some bounds.

        Args:
            bounds: The new ones, by quantity.

        Returns:
            The new tolerance.

        Raises:
            OptionError: A quantity has no bound.
        """
        for name in bounds:
            if name not in QUANTITIES:
                raise OptionError(
                    f'tolerance "{name}" is unknown; there are {", ".join(QUANTITIES)}'
                )
        return replace(self, **bounds)

    def widened(self, bounds: Mapping[str, float]) -> Tolerance:
        """Return the tolerance with no checked bound tighter than the one given for its quantity.

        Args:
            bounds: Bounds by quantity.
        """
        wider = {
            name: (min if name in _SMALLEST else max)(bound, bounds.get(name, bound))
            for name, bound in self.bounds().items()
        }
        return replace(self, **wider)

    def without(self, quantities: Collection[str]) -> Tolerance:
        """Return the tolerance with some quantities unchecked."""
        return replace(self, **dict.fromkeys(quantities))


QUANTITIES = tuple(field.name for field in fields(Tolerance))
"""Names of everything that can have a bound."""

_SMALLEST = ("saliency_rank", "saliency_similarity", "saliency_overlap")
"""Quantities whose bound is the smallest value, not the largest."""

_HALF = Tolerance(
    logits=2e-2,
    masked_logits=2e-2,
    features=2e-2,
    gradients=0.3,
    saliency_rank=0.9,
    saliency_similarity=0.8,
    saliency_overlap=0.8,
    head=2e-2,
    input_gradient=0.3,
    guided_gradient=0.3,
    excitation=1e-2,
)
_EIGHT_BITS = replace(_HALF, masked_logits=0.2)
_TF32 = Tolerance(
    logits=1e-2,
    masked_logits=1e-2,
    features=1e-2,
    gradients=0.1,
    saliency_rank=0.95,
    saliency_similarity=0.9,
    saliency_overlap=0.9,
    head=1e-2,
    input_gradient=0.2,
    guided_gradient=0.2,
    excitation=1e-2,
)
TOLERANCE: dict[PrecisionName, Tolerance] = {
    "fp32": Tolerance(
        logits=1e-4,
        masked_logits=1e-4,
        features=1e-4,
        gradients=1e-2,
        saliency_rank=0.99,
        saliency_similarity=0.98,
        saliency_overlap=0.95,
        head=1e-4,
        input_gradient=1e-2,
        guided_gradient=1e-2,
        excitation=1e-2,
    ),
    "tf32": _TF32,
    "fp16": _HALF,
    "int8": _EIGHT_BITS,
    "fp8": _EIGHT_BITS,
}
"""What a trained network must keep to in each precision; in TF32, where it runs."""

_RANDOM_HALF = Tolerance(logits=0.1, masked_logits=0.1, features=0.4, head=0.1, excitation=0.2)
_RANDOM_EIGHT_BITS = replace(_RANDOM_HALF, masked_logits=0.4)
RANDOM_TOLERANCE: dict[PrecisionName, Tolerance] = {
    "fp32": Tolerance(
        logits=1e-3,
        masked_logits=1e-3,
        features=1e-2,
        gradients=0.2,
        head=1e-3,
        input_gradient=0.2,
        guided_gradient=0.2,
        excitation=0.2,
    ),
    "tf32": replace(_RANDOM_HALF, gradients=0.3),
    "fp16": _RANDOM_HALF,
    "int8": _RANDOM_EIGHT_BITS,
    "fp8": _RANDOM_EIGHT_BITS,
}
"""The same for networks with random weights: they amplify rounding, their ReLUs flip, and channels
that are nearly alike change their collection. Their maps mean nothing and have no bound, and in
half precision, where their gradients may vanish, only what runs forward has."""


def broken_bounds(fidelity: Fidelity, tolerance: Tolerance, layers: Sequence[str]) -> list[str]:
    """Find what breaks its tolerance.

    Args:
        fidelity: What was measured. Quantities of graphs that were not run do not count.
        tolerance: The bounds. A value that is not finite breaks any, and none too.
        layers: Names of the target layers.

    Returns:
        Phrases for a message; empty where nothing is broken.
    """
    bounds = tolerance.bounds()
    phrases = []
    for quantity in QUANTITIES:
        value = getattr(fidelity, quantity)
        if value is UNSET:
            continue
        by_layer = isinstance(value, tuple)
        values = dict(zip(layers, value, strict=True)) if by_layer else {"": value}
        for layer, measured in values.items():
            fault = _fault(quantity, measured, bounds.get(quantity))
            if fault:
                phrases.append(f"{quantity}{f' of {layer}' if layer else ''} {fault}")
    return phrases


def _fault(quantity: str, measured: float, bound: float | None) -> str:
    """What is wrong with a value; empty where it keeps to its bound."""
    if bound is None:
        return "" if np.isfinite(measured) else f"{measured:.3g} is not finite"
    if quantity in _SMALLEST:
        return "" if measured >= bound else f"{measured:.3g} is below {bound:g}"
    return "" if measured <= bound else f"{measured:.3g} is above {bound:g}"

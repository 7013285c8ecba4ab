"""How far graphs may be from PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import UNSET

from ccam_deploy.bundle.manifest import Fidelity

_HALF = {
    "logits": 2e-2,
    "masked_logits": 2e-2,
    "features": 2e-2,
    "gradients": 0.3,
    "saliency_rank": 0.9,
    "saliency_similarity": 0.8,
    "saliency_overlap": 0.8,
    "head": 2e-2,
    "input_gradient": 0.3,
    "guided_gradient": 0.3,
    "excitation": 1e-2,
}
_EIGHT_BITS = {**_HALF, "masked_logits": 0.2}
TOLERANCE = {
    "fp32": {
        "logits": 1e-4,
        "masked_logits": 1e-4,
        "features": 1e-4,
        "gradients": 1e-2,
        "saliency_rank": 0.99,
        "saliency_similarity": 0.98,
        "saliency_overlap": 0.95,
        "head": 1e-4,
        "input_gradient": 1e-2,
        "guided_gradient": 1e-2,
        "excitation": 1e-2,
    },
    "fp16": _HALF,
    "int8": _EIGHT_BITS,
    "fp8": _EIGHT_BITS,
}
_RANDOM_HALF = {
    "logits": 0.1,
    "masked_logits": 0.1,
    "features": 0.4,
    "gradients": 10.0,
    "saliency_rank": -1.0,
    "saliency_similarity": -1.0,
    "saliency_overlap": 0.0,
    "head": 0.1,
    "input_gradient": 10.0,
    "guided_gradient": 10.0,
    "excitation": 0.2,
}
_RANDOM_EIGHT_BITS = {**_RANDOM_HALF, "masked_logits": 0.4}
RANDOM_TOLERANCE = {
    "fp32": {
        "logits": 1e-3,
        "masked_logits": 1e-3,
        "features": 1e-2,
        "gradients": 0.2,
        "saliency_rank": 0.9,
        "saliency_similarity": 0.8,
        "saliency_overlap": 0.8,
        "head": 1e-3,
        "input_gradient": 0.2,
        "guided_gradient": 0.2,
        "excitation": 0.2,
    },
    "fp16": _RANDOM_HALF,
    "int8": _RANDOM_EIGHT_BITS,
    "fp8": _RANDOM_EIGHT_BITS,
}
"""For networks that were not trained: they amplify rounding, and their ReLUs flip. In half
precision their gradients may vanish, so only what runs forward is compared."""
_AT_LEAST = ("saliency_rank", "saliency_similarity", "saliency_overlap")


def broken_bounds(
    fidelity: Fidelity, tolerance: Mapping[str, float], layers: Sequence[str]
) -> list[str]:
    """What breaks its tolerance, as phrases for a message; empty where nothing does.

    Bounds for optional graphs that were not run do not count.
    """
    found = []
    for name, bound in tolerance.items():
        value = getattr(fidelity, name)
        if value is UNSET:
            continue
        values = dict(zip(layers, value, strict=True)) if isinstance(value, tuple) else {"": value}
        for layer, measured in values.items():
            good = measured >= bound if name in _AT_LEAST else measured <= bound
            if not good:
                of = f" of {layer}" if layer else ""
                side = "below" if name in _AT_LEAST else "above"
                found.append(f"{name}{of} {measured:.3g} is {side} {bound:g}")
    return found

"""ONNX operators that resize images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ccam_deploy.export.from_onnx.call import Array, Call, Rule, Value

_SHARP: dict[str, Any] = {"cubic_coeff_a": -0.75, "exclude_outside": 0}
_SMOOTH: dict[str, Any] = {"cubic_coeff_a": -0.5, "exclude_outside": 1}
"""What PyTorch does without and with antialiasing; other values are not taken over."""
_DEFAULTS: dict[str, Any] = {**_SHARP, "keep_aspect_ratio_policy": "stretch"}
_ROUNDED = "round_prefer_floor"
_ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    _ROUNDED: lambda exact: np.ceil(exact - 0.5),
    "round_prefer_ceil": lambda exact: np.floor(exact + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _resize(call: Call) -> Value:
    mode, smooth = call.get("mode", "nearest"), bool(call.get("antialias", 0))
    for name, theirs in {**_DEFAULTS, **(_SMOOTH if smooth else {})}.items():
        matters = mode == "cubic" or name != "cubic_coeff_a"
        if matters and call.get(name, _DEFAULTS[name]) != theirs:
            raise NotImplementedError(f"it resizes with {name} {call.get(name, _DEFAULTS[name])}")
    value = call.tensor(0)
    sides = [int(side) for side in value.shape[2:]]
    old = call.kind == "Upsample" or call.opset < 11  # with factors alone, as the second input
    size, ratios = _new_size(call, value.dim(), sides, old)
    if size == sides:
        return value
    where = call.get("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")
    if mode == "nearest":
        rounding = call.get("nearest_mode", "floor" if old else _ROUNDED)
        return _nearest(value, size, ratios, where, rounding)
    if where not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise NotImplementedError(f"it resizes by {mode} interpolation at {where} places")
    if where == "pytorch_half_pixel" and 1 in size:
        raise NotImplementedError(f"it resizes to a single pixel at {where} places")
    kind = {"linear": "bilinear", "cubic": "bicubic"}[mode]
    corners = where == "align_corners"
    exact = all(side * ratio == new for side, ratio, new in zip(sides, ratios, size, strict=True))
    if corners or exact:
        return F.interpolate(value, size, mode=kind, align_corners=corners, antialias=smooth)
    if smooth:
        raise NotImplementedError("it resizes smoothly by a factor that gives no whole size")
    # Where a factor does not give whole sizes, places are computed with the factor.
    return F.interpolate(
        value, scale_factor=ratios, mode=kind, align_corners=False, recompute_scale_factor=False
    )


def _new_size(
    call: Call, rank: int, sides: Sequence[int], old: bool
) -> tuple[list[int], list[float]]:
    """Read the new height and width, and the ratio of each to the old one.

    Args:
        call: Its sizes, or else its factors, are those of its axes.
        rank: How many axes the images have.
        sides: Their old height and width.
        old: Whether the operator takes factors alone, as its second input.

    Raises:
        NotImplementedError: Something else than height and width is resized.
    """
    axes = [axis % rank for axis in call.get("axes") or range(rank)]
    sizes = None if old else call.sizes(3)
    if sizes:
        by_axis = dict(zip(axes, sizes, strict=True))
        size = [int(by_axis.get(2 + place, side)) for place, side in enumerate(sides)]
        return size, [new / side for new, side in zip(size, sides, strict=True)]
    given = call.known(1 if old else 2).reshape(-1).tolist()
    factors = dict(zip(axes, given, strict=True))
    if any(factors.get(axis, 1) != 1 for axis in (0, 1)):
        raise NotImplementedError("it resizes an axis that is neither height nor width")
    ratios = [float(factors.get(2 + place, 1)) for place in range(len(sides))]
    # The product in float32 may round up to a whole number that the exact one is just below.
    products = np.multiply(np.array(sides, np.float32), np.array(ratios, np.float32))
    size = np.floor(products).astype(int).tolist()
    return size, [
        max(ratio, new / side) for side, ratio, new in zip(sides, ratios, size, strict=True)
    ]


def _nearest(
    value: Tensor, size: Sequence[int], ratios: Sequence[float], where: str, rounding: str
) -> Tensor:
    """Resize to the nearest pixels, where PyTorch takes the same ones.

    Args:
        value: [B, C, H, W].
        size: Height and width of the result.
        ratios: Of each side's new length to the old one.
        where: Which place of the old pixels the middle of a new one is at.
        rounding: Which of two pixels is the nearest.
    """
    sides = [int(side) for side in value.shape[2:]]
    taken = []
    for side, new, ratio in zip(sides, size, ratios, strict=True):
        places = np.arange(new)
        exact: Array
        if where == "asymmetric":
            exact = places / ratio
        elif where == "align_corners":
            exact = places * (side - 1) / max(new - 1, 1)
        elif where in ("half_pixel", "pytorch_half_pixel"):
            exact = (places + 0.5) / ratio - 0.5
            exact = exact if new > 1 or where == "half_pixel" else np.zeros(1)
        else:
            raise NotImplementedError(f"it resizes to the nearest pixel at {where} places")
        rounded = _ROUNDINGS[rounding](exact)
        taken.append(rounded.clip(0, side - 1).astype(int).tolist())
    for mode, shift in (("nearest", 0.0), ("nearest-exact", 0.5)):
        theirs = [
            np.floor((np.arange(new) + shift) * side / new).clip(0, side - 1).astype(int).tolist()
            for side, new in zip(sides, size, strict=True)
        ]
        if theirs == taken:
            return F.interpolate(value, list(size), mode=mode)
    raise NotImplementedError(f"it resizes to the nearest pixel by {rounding} at {where} places")


RULES: dict[str, Rule] = {"Resize": _resize, "Upsample": _resize}
"""What each operator computes."""

"""How a model is called: which input the images are, what the others are, where the logits are."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ccam_deploy.errors import OptionError, SourceError

_LOGITS = "logits"
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def call_with_images(model: nn.Module, images: Tensor, constants: Mapping[str, Any]) -> None:
    """Make a model take images alone and return logits alone, where it does not.

    Args:
        model: A private copy, whose `forward` is replaced; the names of its modules stay.
        images: [B, C, H, W] float32, an example.
        constants: What is bound to other inputs, by name: numbers, None, tensors or arrays.
            Floating-point arrays become float32, which the model is in.

    Raises:
        OptionError: The model has no input of such a name, or an array holds no numbers.
        SourceError: An input is not bound, or none of the outputs is the logits.
    """
    bound = {name: _as_argument(name, value) for name, value in constants.items()}
    first = _images_name(model, bound)
    forward = model.forward

    def call(function: Callable[..., Any], images: Tensor) -> Any:
        if first is None:
            return function(images, **bound)
        return function(**{first: images}, **bound)

    def of_images(images: Tensor) -> Tensor:
        return logits_of(call(forward, images))

    try:
        with torch.no_grad():
            output = call(model, images)
    except Exception:
        output = images  # tracing will fail too, and say why
    if bound or not isinstance(output, Tensor):
        logits_of(output)
        model.forward = of_images


def logits_of(output: Any) -> Tensor:
    """Find the logits in what a model returns.

    They are the tensor itself, what is called "logits" in a dictionary, dataclass or named tuple,
    or the only tensor among several values that has the shape of logits.

    Args:
        output: A tensor, or something that holds tensors.

    Returns:
        The logits, [B, classes] or [B, classes, 1, 1].

    Raises:
        SourceError: There are none, or several.
    """
    if isinstance(output, Tensor):
        return output
    values = _values(output)
    found = values.get(_LOGITS)
    if isinstance(found, Tensor):
        return found
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    fitting = [value for value in tensors.values() if may_be_logits(value)]
    if len(fitting) == 1:
        return fitting[0]
    shown = ", ".join(f"{name} {list(value.shape)}" for name, value in tensors.items())
    which = "several of which" if fitting else "none of which"
    raise SourceError(
        f"the model returns {type(output).__name__} of {shown or 'no tensors'}, {which} may be "
        'logits [batch, classes]; return these alone, or call them "logits" in a dictionary or '
        "dataclass"
    )


def may_be_logits(value: Tensor) -> bool:
    """Tell whether a tensor is [B, classes], or the same with sides of one pixel after it."""
    return value.dim() >= 2 and all(size == 1 for size in value.shape[2:])


def _values(output: Any) -> dict[str, Any]:
    """What an output holds, by name or by place."""
    if isinstance(output, Mapping):
        return {str(name): value for name, value in output.items()}
    if dataclasses.is_dataclass(output):
        names = [field.name for field in dataclasses.fields(output)]
        return {name: getattr(output, name) for name in names}
    if isinstance(output, tuple | list):
        places: Iterable[Any] = getattr(output, "_fields", None) or range(len(output))
        return {str(place): value for place, value in zip(places, output, strict=True)}
    return {}


def _as_argument(name: str, value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.kind not in "biuf":
        raise OptionError(f'constant "{name}" holds {value.dtype}; it must hold numbers')
    dtype = np.float32 if value.dtype.kind == "f" else value.dtype
    return torch.from_numpy(np.array(value, dtype, order="C"))


def _images_name(model: nn.Module, bound: Mapping[str, Any]) -> str | None:
    """The name of the images' input; None where it has none."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return None
    kinds = [parameter.kind for parameter in parameters]
    names = [parameter.name for parameter in parameters if parameter.kind in _NAMED]
    for name in bound:
        if name not in names and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise OptionError(f'the model has no input "{name}"; it has {", ".join(names)}')
    free = [p for p in parameters if p.kind in (*_POSITIONAL, *_NAMED) and p.name not in bound]
    missing = [p.name for p in free if p.default is inspect.Parameter.empty]
    if len(missing) > 1:
        raise SourceError(
            f"the model takes {', '.join(missing)}; bind all but the images, each by "
            "--constant NAME=VALUE (a number, true, false, none or a .npy file)"
        )
    images = next(iter(p for p in free if p.name in missing), next(iter(free), None))
    named = images is not None and images.kind in _NAMED and bool(bound)
    return images.name if named and images is not None else None

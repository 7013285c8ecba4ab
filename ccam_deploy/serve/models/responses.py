"""Triton's requests and responses: tensors as arrays, and errors as one clean line."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import triton_python_backend_utils as triton

from ccam_deploy.errors import CcamError, ImageError, OptionError, RequestError, TargetError
from ccam_deploy.serve.models.metrics import Metrics
from ccam_deploy.serve.requests import Array
from ccam_deploy.text import one_line

Parsed = TypeVar("Parsed")

FAILED = "the explanation failed; the server's log says why"


def parameters_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The parameters in a model's configuration, by name."""
    return {name: value["string_value"] for name, value in config["parameters"].items()}


def input_array(request: Any, name: str) -> Array | None:
    """An input of a request in host memory; None where the request does not have it."""
    tensor = triton.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    values: Array = tensor.as_numpy()
    return values


def request_parameters(request: Any) -> dict[str, str]:
    """What a request says beside its tensors, headers that are passed on included, by name."""
    try:
        parameters = json.loads(request.parameters() or "{}")
    except ValueError:
        parameters = {}
    return {str(name).lower(): str(value) for name, value in parameters.items()}


def response(tensors: Mapping[str, Any]) -> Any:
    """Make a response of arrays, and of tensors of Triton's own."""
    return triton.InferenceResponse(
        [
            triton.Tensor(name, np.ascontiguousarray(values))
            if isinstance(values, np.ndarray)
            else values
            for name, values in tensors.items()
        ]
    )


def parse_each(
    requests: Sequence[Any], parse: Callable[[Any], Parsed], metrics: Metrics
) -> tuple[list[Any], dict[int, Parsed]]:
    """Read the requests of a batch, so that one that is refused takes no other with it.

    Args:
        requests: Triton's requests.
        parse: Reads one; what it raises refuses that one.
        metrics: Where refusals are counted.

    Returns:
        A response for each request that is refused, None for the others; and what these ask, by
        their places.
    """
    answers: list[Any] = [None] * len(requests)
    parsed: dict[int, Parsed] = {}
    for index, request in enumerate(requests):
        try:
            parsed[index] = parse(request)
        except Exception as error:
            answers[index] = refusal(error, metrics)
    return answers, parsed


def refusal(error: Exception, metrics: Metrics) -> Any:
    """Make the response to a request that failed, and count it.

    A caller's mistake is told as it is. Of an engine's failure only this package's own words are
    told, for other libraries' may name places on the server; the log has them.

    Args:
        error: What was raised.
        metrics: Where it is counted.
    """
    if isinstance(error, ImageError | TargetError | OptionError | RequestError):
        metrics.refused(error.reason if isinstance(error, RequestError) else "other")
        return _error(str(error), triton.TritonError.INVALID_ARG)
    metrics.failed()
    triton.Logger.log_error(one_line("".join(traceback.format_exception(error))))
    own = isinstance(error, CcamError) and error.__cause__ is None
    return _error(str(error) if own else FAILED, triton.TritonError.INTERNAL)


def unavailable(message: str, metrics: Metrics) -> Any:
    """Make the response to a request that cannot be answered for now, and count it."""
    metrics.failed()
    return _error(message, triton.TritonError.UNAVAILABLE)


def _error(message: str, code: Any) -> Any:
    line = one_line(" ".join(message.split()))
    return triton.InferenceResponse([], triton.TritonError(line, code))
